"""Tables 5 to 9 and 11 of docs/findings.md: objectives, data, draws, weights and costs, with their sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from findings_study.plan import (
    DENSE_SHARES,
    DIV_16,
    EIGHT,
    GRID,
    OBJECTIVES,
    PRUNERS,
    QUESTIONS,
    RATES,
    STRENGTHS,
    elastic,
    long_specialist,
    short_elastic,
    specialist,
    tuned_on_dense,
    tuned_on_random,
)
from findings_study.results import NONE, BySeed, Results, brief, changed, full, said, short, special, untrained
from findings_study.tables import PICTURES, head, row, seeds_of
from findings_study.training import Recipe
from findings_study.world import DENSE, Cell


def objectives(results: Results) -> Iterator[str]:
    """Yield table 5: what is trained towards."""
    yield "## Table 5: objectives"
    yield ""
    yield f"![{PICTURES['objectives']}](images/findings_objectives.png)"
    yield ""
    yield (
        "Elastic projectors of 125 updates on 2,000 scenes; the mean is that of the eight cells at 16 and 36 tokens."
    )
    yield ""
    yield head("objective", "mean of 8", "against ce", "divprune 16", "dense", "dense against ce", "busy seconds", "n")
    plain = OBJECTIVES["ce"]
    for name, changes in OBJECTIVES.items():
        made, ce = brief(**changes), brief(**plain)
        mean = results.accuracy(made, EIGHT)
        yield row(
            name,
            said(mean),
            "" if name == "ce" else said(results.above(made, ce, EIGHT), True),
            said(results.accuracy(made, DIV_16)),
            said(results.accuracy(made, DENSE)),
            "" if name == "ce" else said(results.above(made, ce, DENSE), True),
            _seconds(results, short_elastic(**changes)),
            seeds_of(mean),
        )
    yield row("no training", said(results.accuracy(untrained, EIGHT)), "", said(results.accuracy(untrained, DIV_16)),
              said(results.accuracy(untrained, DENSE)), "", "", "")  # fmt: skip
    yield ""
    yield (
        "`kl` compares answer positions, `hidden` the last layer's states at text positions unless it names another, "
        "`feature` the mean of the visual tokens; the teacher is the same model with all tokens and its original "
        "projector, "
        "whose states were stored before. `kl`, `hidden` and `feature` read no answer as a label, though the "
        "answers stand in "
        "the text. *Busy seconds* are those of one core, of the training alone."
    )
    yield ""
    yield from _about_objectives(results)


def _about_objectives(results: Results) -> Iterator[str]:
    ce = brief(**OBJECTIVES["ce"])
    for name in ("gce", "kl", "hidden", "hidden, layer 2 of 3", "feature", "gce + hidden"):
        made = brief(**OBJECTIVES[name])
        pruned, dense = results.above(made, ce, EIGHT), results.above(made, ce, DENSE)
        if pruned and dense:
            yield (
                f"* Row *{name}*: {pruned.signed()} points against ce on pruned pictures, {dense.signed()} on "
                "whole ones."
            )
    last, second = (results.seconds(short_elastic(**OBJECTIVES[name])) for name in ("hidden", "hidden, layer 2 of 3"))
    if last and second:
        yield (
            f"* Rows *hidden* and *hidden, layer 2 of 3*: stopping behind layer 2 of 3 takes {second:.0f} busy "
            "seconds against "
            f"{last:.0f}, {100 * (1 - second / last):.0f} % less; it trains towards less, too."
        )


def _seconds(results: Results, recipe: Recipe) -> str:
    found = results.seconds(recipe)
    return NONE if found is None else f"{found:.0f}"


def data(results: Results) -> Iterator[str]:
    """Yield tables 6 and 7: how much data, and which learning rate."""
    yield "## Table 6: how many questions"
    yield ""
    yield (
        "Eight questions a picture; the number of updates stays, so few pictures are seen often. Elastic columns "
        "are the mean of "
        "eight cells and, behind the stroke, dense."
    )
    yield ""
    yield head("questions", "pictures", "specialist divprune 16", "elastic, 125 updates", "elastic, 1,000 updates", "n")
    for questions, scenes in QUESTIONS.items():
        own = results.accuracy(special(DIV_16, scenes=scenes), DIV_16)
        yield row(
            f"{questions:,}",
            f"{scenes:,}",
            said(own),
            _both(results, brief(scenes=scenes)),
            _both(results, full(scenes=scenes)),
            seeds_of(own),
        )
    yield ""
    few, many = special(DIV_16, scenes=125), special(DIV_16, scenes=2000)
    lost, gained = results.above(few, many, DIV_16), results.above(few, untrained, DIV_16)
    if lost and gained:
        yield (
            f"* Rows *1,000* and *16,000*: a specialist of 1,000 questions gains {gained.signed()} points, "
            f"{lost.signed()} against "
            "one of 16,000 with as many updates."
        )
    short_few, short_many = brief(scenes=125), brief(scenes=2000)
    lost = results.above(short_few, short_many, EIGHT)
    if lost:
        yield f"* The same rows, elastic with 125 updates: {lost.signed()} points."
    lost = results.above(full(scenes=125), full(), EIGHT)
    if lost:
        yield f"* Rows *1,000* and *48,000*, elastic with 1,000 updates: {lost.signed()} points for the smaller set."
    yield ""
    yield "## Table 7: learning rates"
    yield ""
    yield head("rate", "specialist divprune 16", "its dense", "elastic, 125 updates: mean of 8 / dense", "n")
    for rate in RATES:
        made = special(DIV_16, learning_rate=rate)
        own = results.accuracy(made, DIV_16)
        both = _both(results, brief(learning_rate=rate))
        yield row(f"{rate:g}", said(own), short(results.accuracy(made, DENSE)), both, seeds_of(own))


def _both(results: Results, made: BySeed) -> str:
    pruned, dense = results.accuracy(made, EIGHT), results.accuracy(made, DENSE)
    return NONE if pruned is None else f"{pruned.plain()} / {short(dense)}"


def sampling(results: Results) -> Iterator[str]:
    """Yield table 8: how settings are drawn."""
    yield "## Table 8: how settings are drawn"
    yield ""
    yield (
        "Elastic projectors of 125 updates; the reference draws for each of 4 groups and is dense with probability 1/4."
    )
    yield ""
    yield head("recipe", "mean of 8", "against the reference", "divprune 16", "dense", "dense against it", "n")
    even = dict.fromkeys(PRUNERS, 1.0)
    rows: list[tuple[str, dict[str, Any]]] = [("reference", {})]
    for name, share in DENSE_SHARES.items():
        if share != 0.25:
            rows.append((f"dense share {name}", {"dense": share}))
    rows.append(("sandwich: a quarter dense, a quarter 8 tokens, the rest drawn", {"sandwich": True, "dense": 0.0}))
    rows.append(("one cell an update", {"groups": 1}))
    rows.append(("every pruner alike", {"weights": even}))
    for name, changes in rows:
        made, reference = brief(**changes), brief()
        mean = results.accuracy(made, EIGHT)
        yield row(
            name,
            said(mean),
            "" if not changes else said(results.above(made, reference, EIGHT), True),
            said(results.accuracy(made, DIV_16)),
            said(results.accuracy(made, DENSE)),
            "" if not changes else said(results.above(made, reference, DENSE), True),
            seeds_of(mean),
        )
    none, half = (results.above(brief(dense=share), brief(), DENSE) for share in (0.0, 0.5))
    if none and half:
        yield ""
        yield (
            f"Rows *dense share 0* and *1/2*: {none.signed()} and {half.signed()} points on whole pictures "
            "against a share of 1/4; "
            "what that costs on pruned ones is in the column beside."
        )


def weights(results: Results) -> Iterator[str]:
    """Yield table 9: the dial and the running mean."""
    yield "## Table 9: the dial and the running mean of weights"
    yield ""
    yield "Strength a is w0 + a (w - w0), from the original weights w0 to the tuned ones w."
    yield ""
    yield head("strength", "elastic: mean of 8", "elastic: dense", "specialist divprune 16", "its dense", "n")
    for strength in (*STRENGTHS, 1.0):
        many, own = changed(full(), strength=strength), changed(special(DIV_16), strength=strength)
        mean = results.accuracy(many, EIGHT)
        yield row(
            f"{strength:g}",
            said(mean),
            said(results.accuracy(many, DENSE)),
            said(results.accuracy(own, DIV_16)),
            said(results.accuracy(own, DENSE)),
            seeds_of(mean),
        )
    ema = changed(full(), kind="ema")
    mean = results.accuracy(ema, EIGHT)
    yield row("running mean, 0.99", said(mean), said(results.accuracy(ema, DENSE)), NONE, NONE, seeds_of(mean))
    half, whole_one = changed(special(DIV_16), strength=0.5), special(DIV_16)
    lost, won = results.above(half, whole_one, DIV_16), results.above(half, whole_one, DENSE)
    moved = results.above(ema, full(), EIGHT)
    yield ""
    if lost and won:
        yield (
            f"* Row *0.5*: half of a specialist's way costs {lost.signed()} points in its cell and brings "
            f"{won.signed()} dense ones."
        )
    if moved:
        yield (
            f"* Row *running mean*: {moved.signed()} points against the last weights, whose learning rate ends at "
            "0 anyway."
        )


def costs(results: Results) -> Iterator[str]:
    """Yield table 11: what each kind of run takes."""
    yield "## Table 11: what a training takes"
    yield ""
    places = sorted({stored["on"] for stored in results.runner.store.rows.values() if "on" in stored})
    yield (
        "Seconds that one core is busy, median over seeds, without the scoring; "
        f"{'; '.join(places) or 'nothing trained yet'}."
    )
    yield ""
    yield head("training", "updates", "questions seen", "busy seconds")
    rows = [
        ("specialist, fastervlm 8", specialist(GRID[0])),
        ("specialist, divprune 16", specialist(DIV_16)),
        ("specialist, divprune 72", specialist(Cell("divprune", 72))),
        ("control, dense", tuned_on_dense()),
        ("control, fresh random positions", tuned_on_random()),
        ("elastic, short", short_elastic()),
        ("elastic", elastic()),
        ("specialist, divprune 16, long", long_specialist(DIV_16)),
    ]
    for name, recipe in rows:
        yield row(name, f"{recipe.steps:,}", f"{recipe.steps * 128:,}", _seconds(results, recipe))
    own = [results.seconds(specialist(cell)) for cell in GRID]
    mine = results.seconds(elastic())
    if mine and all(own):
        yield ""
        total = sum(value or 0 for value in own)
        yield (
            f"Sixteen specialists of 125 updates take {total:.0f} busy seconds together, the elastic projector "
            f"{mine:.0f}: "
            f"{mine / total:.1f} times as much for one adapter instead of sixteen."
        )
    trained = sum(stored["busy"] for stored in results.runner.store.rows.values() if "busy" in stored)
    yield ""
    yield f"All trainings stored so far: {trained / 60:.0f} busy minutes of one core."
