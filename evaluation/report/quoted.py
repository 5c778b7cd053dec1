"""Rows quoted from papers: shown beside measured ones, under the very metric that they have, and marked."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.report.tables.table import QuotedRow, Row, Table
from prunetune.evaluation.tasks.base import tasks
from prunetune.names import nearest
from prunetune.reading import read_yaml, shown

PAPERS = Path(__file__).parent / "papers"
"""The tables that ship with this package, a file for each paper."""
# All four or none: a number without its budget or its source can't be read beside others.
FIELDS = ("arm", "kept", "values", "cite")
MORE_FIELDS = ("model", "method", "projector", "relative")
COLUMNS = (
    "paper", "table", "model", "method", "arm", "projector", "budget", "task", "metric", "value", "relative", "note",
)  # fmt: skip
PROJECTORS = ("training-free", "tuned", "elastic", "other")
_METHODS = Path(__file__).parents[2] / "pruning" / "methods"
_CROPS = {"llava-1.5": (576, 1), "llava-1.6": (2880, 5)}
"""Of a family's whole image, as papers count: visual tokens, and the crops that a budget of ours counts for each."""


@dataclass(frozen=True)
class Quote:
    """One row of a paper's table.

    Attributes:
        arm: what was measured there, in the paper's words.
        kept: visual tokens.
        values: numbers by column: ``pope/f1``.
        cite: where it stands.
        model: which model; empty if that is not said, and then no row of ours stands beside it.
        method: our name of the pruner, "dense" without pruning; empty where we have none.
        projector: whose projector it ran with.
        relative: the paper's own relative average in percent.
    """

    arm: str
    kept: float
    values: Mapping[str, float]
    cite: str
    model: str = ""
    method: str = ""
    projector: str = "training-free"
    relative: float | None = None


def papers() -> list[str]:
    """Return the names of the papers whose tables ship with this package."""
    return sorted(path.stem for path in PAPERS.glob("*.csv"))


def source_file(source: str | Path) -> Path:
    """Return the file of a source: of a paper by its name, or the file itself, which need not be there."""
    return PAPERS / f"{source}.csv" if str(source) in papers() else Path(source)


def read_quoted(source: str | Path) -> list[Quote]:
    """Return the quoted rows of a paper that ships with this package, of a CSV file like those, or of a YAML list.

    Args:
        source: a name of :func:`papers`, or a file. A YAML file holds a list of ``{arm, kept, values, cite}``, where
            values are by column (``{pope/f1: 85.9}``), and may have model, method, projector and relative.

    Raises:
        TaskError: for a missing or broken file, or a row that lacks something or has another type there.
    """
    path = source_file(source)
    if not path.is_file():
        raise TaskError(
            f"{source} is neither a file nor a paper whose tables are here{nearest(source, papers())} (there are "
            f"{', '.join(papers())}); give a YAML list of quoted rows: arm, kept, values, cite"
        )
    if path.suffix == ".csv":
        return _of_csv(path)
    records = read_yaml(path, TaskError)
    if not isinstance(records, list) or not records:
        raise TaskError(f"{path} must hold a list of quoted rows: arm, kept, values, cite; it holds {shown(records)}")
    return [_of_yaml(record, f"{path}, row {number}") for number, record in enumerate(records, start=1)]


def beside(table: Table, quotes: Sequence[Quote]) -> Table:
    """Return the table with quoted rows of its models, each beside our row of the same setting, if there is one.

    Of a quoted row those values are shown whose benchmark and metric the table has a column for; no other is put under
    them.

    Raises:
        TaskError: for a benchmark, a metric or a method that nothing here has, or if no row is of a model of the table.
    """
    if not quotes:
        return table
    metrics = known_metrics()
    for column in table.columns:
        metrics.setdefault(column.task, set()).add(column.metric)
    check_names(quotes, metrics, {row.method for row in table.rows})
    models = {name for row in table.rows for name in _models(row)}
    found = []
    for quote in quotes:
        if quote.model and plain_model(quote.model) not in models:
            continue
        values = {column.key: quote.values[column.key] for column in table.columns if column.key in quote.values}
        if not values and quote.relative is None:
            continue
        ours = next((row for row in table.rows if _same_setting(row, quote)), None)
        found.append(
            QuotedRow(
                label=quote.arm,
                model=quote.model,
                method=quote.method or quote.arm,
                budget=quote.kept,
                cite=quote.cite,
                values=values,
                relative=quote.relative,
                beside=None if ours is None else ours.id,
                differences={} if ours is None else _differences(ours, values),
            )
        )
    if not found:
        raise TaskError(
            f"no quoted row is of a model and a column of this table: they are of "
            f"{', '.join(sorted({quote.model for quote in quotes}))}, the table is of {', '.join(sorted(models))}"
        )
    return table.model_copy(update={"quoted": [*table.quoted, *found]})


def check_names(quotes: Sequence[Quote], metrics: Mapping[str, set[str]], methods: set[str]) -> None:
    """Check that benchmarks, metrics and methods of quoted rows are known.

    Args:
        quotes: the rows.
        metrics: that columns can have, by benchmark.
        methods: of a table's rows, beside those that are ours.

    Raises:
        TaskError: for the first that is not known, with the nearest name.
    """
    if not quotes:
        return
    known = known_methods() | methods
    for quote in quotes:
        where = f"the quoted row {quote.arm!r} ({quote.cite})"
        if quote.method and quote.method not in known:
            raise TaskError(
                f"{where}: unknown method {quote.method!r}{nearest(quote.method, known)}; leave it out where we have "
                "none"
            )
        for key in quote.values:
            _check_key(key, metrics, where)


def _check_key(key: str, metrics: Mapping[str, set[str]], where: str) -> None:
    task, _, metric = key.partition("/")
    if task == "overall":
        raise TaskError(
            f"{where}: 'overall' is no metric of a benchmark; name one, such as pope/f1, and give a paper's relative "
            "average as relative"
        )
    if task not in metrics:
        raise TaskError(f"{where}: unknown benchmark {task!r}{nearest(task, metrics)}, in {key!r}")
    if metric not in metrics[task]:
        names = sorted(metrics[task])
        raise TaskError(
            f"{where}: {task} has no metric {metric!r}{nearest(metric, names)}; it has "
            f"{', '.join(f'{task}/{name}' for name in names)}"
        )


def known_metrics() -> dict[str, set[str]]:
    """Return the metrics that tables have columns for, by benchmark."""
    found = {}
    for name, task in tasks().items():
        found[name] = {"accuracy"} if task.scorer is None else {metric.name for metric in task.scorer.metrics}
    return found


def known_methods() -> set[str]:
    """Return the names of our pruners, and "dense"."""
    # Importing them takes torch, and seconds; their names stand in their files.
    found = {"dense"}
    registered = re.compile(r'^@register_(?:pruner|stage)\(\s*"(\w+)"', re.MULTILINE)
    for path in (*_METHODS.glob("*.py"), *_METHODS.parent.glob("stages/methods/*.py")):
        found.update(registered.findall(path.read_text(encoding="utf-8")))
    return found - {"identity"}


def plain_model(name: str) -> str:
    """Return a model's name as papers and the hub both have it: ``llava-1.6-7b``."""
    plain = name.rstrip("/").split("/")[-1].lower()
    for old, new in (("llava-next-", "llava-1.6-"), ("llava-v", "llava-"), ("-vicuna", "")):
        if not plain.startswith("llava-next-video"):
            plain = plain.replace(old, new)
    return re.sub(r"(-hf|-instruct)+$", "", plain)


def _models(row: Row) -> set[str]:
    """Return what a row's model is called: by the table, and by its checkpoint's path."""
    path = row.facts.get("model")
    return {plain_model(name) for name in (row.model, path) if isinstance(name, str) and name}


def _same_setting(row: Row, quote: Quote) -> bool:
    if not quote.model or plain_model(quote.model) not in _models(row) or row.method != quote.method:
        return False
    if row.projector != quote.projector or not _as_published(row):
        return False
    return row.method == "dense" or _tokens(row) == round(quote.kept)


def _as_published(row: Row) -> bool:
    """Return whether a row's method runs as its defaults say, which are its paper's; another is no such row."""
    pruning = json.loads(str(row.facts.get("pruning", "{}")))
    # Without a tuned projector both choices are one.
    own_choice = row.projector != "training-free" and pruning.get("choose_with", "tuned") != "tuned"
    inside = pruning.get("stages") or []
    if any(stage.get("options") or stage.get("boundaries") for stage in inside):
        return False
    return not pruning.get("options") and pruning.get("profile") is None and not own_choice


def _tokens(row: Row) -> int | None:
    """Return a row's budget in visual tokens of a whole image, as papers count; None where that can't be said."""
    families = ["-".join(name.split("-")[:2]) for name in sorted(_models(row))]
    total, crops = next((_CROPS[name] for name in families if name in _CROPS), (None, 1))
    pruning = json.loads(str(row.facts.get("pruning", "{}")))
    if pruning.get("stages"):
        # Papers on pruning inside the LLM give the mean over its layers, as the budget that was asked for.
        averages = [stage.get("average") for stage in pruning["stages"]]
        return round(averages[0]) if len(averages) == 1 and averages[0] is not None else None
    keep = pruning.get("keep", row.budget)
    if isinstance(keep, int):
        return keep * (1 if pruning.get("scope") == "image" else crops)
    try:
        share = float(str(keep).removesuffix("%")) / (100 if str(keep).endswith("%") else 1)
    except ValueError:
        return None
    return None if total is None else round(share * total)


def _differences(row: Row, values: Mapping[str, float]) -> dict[str, float]:
    found = {}
    for key, value in values.items():
        ours = row.values[key].value
        if ours is not None:
            found[key] = ours - value
    return found


def _of_yaml(record: Any, where: str) -> Quote:
    # Without its source a number from a paper could be taken for a measured one.
    if not isinstance(record, dict) or not set(FIELDS) <= set(record) <= {*FIELDS, *MORE_FIELDS}:
        raise TaskError(
            f"{where}: a quoted row has exactly arm, kept, values and cite, and may have model, method, projector and "
            f"relative; got {shown(record)}"
        )
    values = record["values"]
    for name in ("arm", "cite", "model", "method", "projector"):
        if not isinstance(record.get(name, ""), str):
            raise TaskError(f"{where}: {name} is text, got {shown(record[name])}")
    if not _is_number(record["kept"]):
        raise TaskError(f"{where}: kept is a number of visual tokens, got {shown(record['kept'])}")
    if not isinstance(values, dict) or not all(isinstance(column, str) for column in values):
        raise TaskError(f"{where}: values are numbers by column, such as {{pope/f1: 85.9}}, got {shown(values)}")
    for column, value in values.items():
        if not _is_number(value):
            raise TaskError(f"{where}: the value of {column} is a number, got {shown(value)}")
    if not _is_number(record.get("relative", 0)):
        raise TaskError(f"{where}: relative is a number in percent, got {shown(record['relative'])}")
    _check_projector(record.get("projector", PROJECTORS[0]), where)
    return Quote(**record)


def _check_projector(name: str, where: str) -> None:
    if name not in PROJECTORS:
        raise TaskError(f"{where}: projector is one of {', '.join(PROJECTORS)}, got {shown(name)}")


def _of_csv(path: Path) -> list[Quote]:
    """Return the rows of a file with a line for each value."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise TaskError(f"{path} is no CSV file: {error}") from None
    if not lines or tuple(lines[0]) != COLUMNS:
        raise TaskError(f"{path} has other columns than {', '.join(COLUMNS)}, or no line")
    found: dict[tuple[str, ...], Quote] = {}
    for number, line in enumerate(lines, start=2):
        where = f"{path}, line {number}"
        if None in line or None in line.values():
            raise TaskError(f"{where}: it has another number of cells than there are columns")
        own = tuple(line[name] for name in ("paper", "table", "model", "arm", "budget"))
        _check_projector(line["projector"], where)
        quote = Quote(
            arm=line["arm"],
            kept=_number(line["budget"], where, "budget"),
            values={},
            cite=f"{line['paper']}, table {line['table']}",
            model=line["model"],
            method=line["method"],
            projector=line["projector"],
            relative=_number(line["relative"], where, "relative") if line["relative"] else None,
        )
        before = found.setdefault(own, quote)
        key = f"{line['task']}/{line['metric']}"
        if key in before.values or quote.relative != before.relative:
            raise TaskError(f"{where}: {key} or the relative average stands there twice for {' '.join(own)}")
        values = {**before.values, key: _number(line["value"], where, "value")}
        found[own] = Quote(**{**before.__dict__, "values": values})
    return list(found.values())


def _number(text: str, where: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise TaskError(f"{where}: {name} is a number, got {shown(text)}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_all(sources: Iterable[str | Path]) -> list[Quote]:
    """Return the quoted rows of several sources, see :func:`read_quoted`."""
    return [quote for source in sources for quote in read_quoted(source)]
