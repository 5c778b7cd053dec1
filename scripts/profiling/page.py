"""A profile as people read it: Markdown, for the screen and for ``profile.md``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prunetune.scripts.profiling.record import ArmCost, BatchCost, Costs, ModelCost, Number
from prunetune.scripts.profiling.stages import PRUNERS_OWN, STAGES

MIB, GIB = 2**20, 2**30
FASTER = ("prefill", "first token", "decode", "end to end")


def to_markdown(costs: Costs) -> str:
    """Return the page."""
    lines = [
        "# What the arms cost",
        "",
        f"{costs.device}, {costs.threads} CPU threads, "
        + ", ".join(f"{name} {version}" for name, version in costs.versions.items())
        + f"; answers of {costs.new_tokens} tokens; medians of {costs.repeats} rounds after {costs.warmup} to warm up, "
        "every round runs each arm once. In brackets the interval of the median: 95 %, or of fewer than six rounds "
        "from the least to the greatest.",
    ]
    for model in costs.models:
        lines += ["", f"## {model.name}", "", _about(model)]
        for size in _sizes(model):
            rows = [(arm, batch) for arm in model.arms for batch in arm.batches if batch.size == size]
            lines += ["", f"### Batches of {size}", "", *_stages(rows), "", *_speed(rows), "", *_computed(rows)]
            lines += ["", *_stock(rows)]
        if any(arm.load for arm in model.arms):
            lines += ["", "### Under load", "", *_load(model)]
        refused = [f"* {arm.label}: not measured: {arm.refused}" for arm in model.arms if arm.refused]
        lines += ["", *refused] if refused else []
    lines += ["", *(f"* {note}" for note in costs.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _about(model: ModelCost) -> str:
    weights = "random weights" if model.random_weights else f"frozen weights {str(model.frozen_hash)[:12]}"
    config = model.config
    return f"`{config.path}`, {config.dtype}, attention {config.attention}, {weights}; asked: {model.asked}."


def _sizes(model: ModelCost) -> list[int]:
    return list(dict.fromkeys(batch.size for arm in model.arms for batch in arm.batches))


Rows = Sequence[tuple[ArmCost, BatchCost]]


def _stages(rows: Rows) -> Iterator[str]:
    names = ["inputs", *STAGES]
    if not any(batch.average is not None for _, batch in rows):  # nothing is pruned inside the LLM
        names.remove("inside")
    body = []
    for arm, batch in rows:
        shares = []
        for parts in (("selection",), PRUNERS_OWN):
            own = sum(batch.stages[name].median for name in parts)
            shares.append(f"{own / rows[0][1].prefill.median:.1%} / {own / batch.prefill.median:.1%}")
        body.append([arm.label, *(_digits(batch.stages[name].median) for name in names), *shares])
    own_names = "signals, selection, rewriting and inside" if "inside" in names else "signals, selection and rewriting"
    yield f"Milliseconds of each stage, waited for one by one; {own_names} are the pruner's own."
    yield ""
    heads = ["arm", *names, "selection, of the dense / own prefill", "all the pruner's own, of the dense / own prefill"]
    yield from _table(heads, body)


def _speed(rows: Rows) -> Iterator[str]:
    body = []
    for arm, batch in rows:
        measured = [batch.prefill, batch.first_token, batch.decode, batch.end_to_end]
        body.append([arm.label, *map(_number, measured), *(_times(batch.faster.get(name)) for name in FASTER)])
    heads = ["prefill, ms", "first token, ms", "decode, tokens/s", "end to end, ms"]
    yield from _table(["arm", *heads, *(f"{name}, x dense" for name in FASTER)], body)


def _computed(rows: Rows) -> Iterator[str]:
    dense = sum(rows[0][1].flop.values())
    body = []
    for arm, batch in rows:
        own = sum(batch.counted[name] for name in PRUNERS_OWN)
        total = sum(batch.flop.values())
        counted = sum(batch.counted.values()) - own
        body.append(
            [arm.label, _visual(batch), f"{batch.tokens}", *(_digits(value / 1e9) for value in batch.flop.values()),
             _digits(own / 1e9), f"{dense / total:.2f}", f"{counted / total:.4f}", _digits(batch.cache / MIB),
             _cache(batch), "-" if batch.peak is None else f"{batch.peak / GIB:.2f}"]
        )  # fmt: skip
    parts = [f"{name}, GFLOP" for name in rows[0][1].flop]
    heads = ["visual tokens", "prompt", *parts, "pruner, GFLOP counted", "fewer than dense, x", "counted / computed",
             "cache, MiB", "cache measured", "peak, GiB"]  # fmt: skip
    yield "Of one request; computed from the shape: two for a multiplication and an addition, attention over all pairs."
    yield ""
    yield from _table(["arm", *heads], body)


def _visual(batch: BatchCost) -> str:
    """Return a request's visual tokens; of those that are pruned inside the LLM also what a layer processes."""
    return f"{batch.kept:g}" if batch.average is None else f"{batch.kept:g}, {batch.average:g} a layer"


def _cache(batch: BatchCost) -> str:
    if batch.cache_measured is None:
        return "-"
    return "equal" if batch.cache_measured == batch.cache else _digits(batch.cache_measured / MIB)


def _stock(rows: Rows) -> Iterator[str]:
    for arm, batch in rows:
        if batch.same_as_stock is not None:
            same = "the same tokens" if batch.same_as_stock else "other tokens"
            told = ", ".join(f"{_times(number)} times as long {name}" for name, number in batch.over_stock.items())
            yield f"Beside the stock model without this package, {arm.label} takes {told}, and makes {same}."


def _load(model: ModelCost) -> Iterator[str]:
    body = []
    told = ""
    for arm in model.arms:
        load = arm.load
        if load is None:
            continue
        told = (
            f"{load.clients} requests in flight, {load.requests} a round, at most {load.at_most} in a batch; each "
            "client asks again when it has its answer."
        )
        body.append(
            [arm.label, _number(load.rate), _times(load.faster), _number(load.half), _number(load.nearly_all),
             f"{load.batch:.1f}", _number(load.joules)]
        )  # fmt: skip
    heads = ["requests/s", "x dense", "half waited at most, ms", "95 % at most, ms", "in a batch", "J a request"]
    yield told
    yield ""
    yield from _table(["arm", *heads], body)


def _number(number: Number | None) -> str:
    if number is None:
        return "-"
    return f"{_digits(number.median)} [{_digits(number.low)}, {_digits(number.high)}]"


def _times(number: Number | None) -> str:
    return "-" if number is None else f"{number.median:.2f} [{number.low:.2f}, {number.high:.2f}]"


def _digits(value: float) -> str:
    """Return three digits, or all before the point."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'|'.join(['---', *['---:'] * (len(heads) - 1)])}|"
    for row in body:
        yield f"| {' | '.join(row)} |"


def computed_markdown(name: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table of what was computed alone, by arm and then by what it is called."""
    heads = list(next(iter(rows.values())))
    body = [[arm, *(_digits(values[head]) for head in heads)] for arm, values in rows.items()]
    return "\n".join([f"## {name}", "", *_table(["arm", *heads], body)]) + "\n"
