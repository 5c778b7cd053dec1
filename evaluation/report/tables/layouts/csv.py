"""A table as CSV, for programs: every number of it, a line for each row, quoted ones last."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping

from prunetune.evaluation.report.tables.table import Difference, QuotedRow, Row, Table, Value


def to_csv(table: Table) -> str:
    """Return the table as CSV with plain numbers.

    A metric's columns begin with its key: ``pope/f1``, ``pope/f1 low``, ``pope/f1 high``, ``pope/f1 gain``,
    ``pope/f1 gain low``, ``pope/f1 gain high``, ``pope/f1 gain p``, ``pope/f1 gain adjusted``; ``pope/f1 [random]`` is
    one kind of question, ``pope hard`` the accuracy of its hard part. ``relative`` and ``pooled`` are written alike.
    A column is there if some row has something in it. Numbers have four digits, p has four that count; those of quoted
    rows are as the paper prints them.
    """
    lines = [_measured(row) for row in table.rows] + [_quoted(row) for row in table.quoted]
    first = [name for column in table.columns for name in _metric_names(column.key)]
    names = _ordered(lines, first)
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _metric_names(key: str) -> list[str]:
    gain = [f"{key} gain{part}" for part in ("", " low", " high", " p", " adjusted", " test")]
    own = [f"{key}{part}" for part in ("", " low", " high", " seeds", " between", " note")]
    return [*own, *gain, f"{key} ours minus quoted"]


_FIRST = ("id", "arm", "model", "method", "budget", "kept", "per_layer", "projector", "twin")
_LAST = ("folders", "quoted", "beside")


def _ordered(lines: list[dict[str, str]], metrics: list[str]) -> list[str]:
    """Return the names of all columns: whose the row is, metrics in the table's order, everything else, quotes."""
    there = dict.fromkeys(name for line in lines for name in line)
    in_order = [name for name in (*_FIRST, *metrics) if name in there]
    last = [name for name in _LAST if name in there]
    between = [name for name in there if name not in {*in_order, *last}]
    return [*in_order, *between, *last]


def _measured(row: Row) -> dict[str, str]:
    line = {
        "id": row.id,
        "arm": row.label,
        "model": row.model,
        "method": row.method,
        "budget": row.budget,
        "kept": _number(row.kept),
        "projector": row.projector,
        "twin": row.twin or "",
    }
    if row.per_layer is not None:
        line["per_layer"] = _number(row.per_layer)
    for name, value in _values(row):
        line.update(_value(name, value))
    gains = {**row.gains, "relative": row.relative_gain, "pooled": row.pooled_gain}
    for name, gain in gains.items():
        if gain is not None:
            line.update(_difference(f"{name} gain", gain))
    for name, fact in row.facts.items():
        # A fact may have the name of a column of ours: "model" is the path there.
        line[f"fact {name}" if name in line or name in _LAST else name] = "" if fact is None else str(fact)
    line["folders"] = "; ".join(row.folders)
    return line


def _values(row: Row) -> Iterator[tuple[str, Value]]:
    """Give all values of a row by the name of their column."""
    yield from row.values.items()
    for key, kinds in row.by_type.items():
        for kind, value in kinds.items():
            yield f"{key} [{kind}]", value
    for task, value in row.hard.items():
        yield f"{task} hard", value
    if row.relative is not None:
        yield "relative", row.relative
    if row.pooled is not None:
        yield "pooled", row.pooled
    yield from row.costs.items()


def _value(name: str, value: Value) -> dict[str, str]:
    parts = {name: _number(value.value)}
    if value.interval is not None:
        parts[f"{name} low"], parts[f"{name} high"] = map(_number, value.interval)
    if value.seeds != 1:
        parts[f"{name} seeds"] = str(value.seeds)
    if value.between is not None:
        parts[f"{name} between"] = _number(value.between)
    if value.note:
        parts[f"{name} note"] = value.note
    return parts


def _difference(name: str, gain: Difference) -> dict[str, str]:
    parts = {name: _number(gain.value)}
    if gain.interval is not None:
        parts[f"{name} low"], parts[f"{name} high"] = map(_number, gain.interval)
    for part, p in (("p", gain.p), ("adjusted", gain.adjusted)):
        if p is not None:  # four digits that count: 0.0000 would be read as certain
            parts[f"{name} {part}"] = f"{p:.4g}"
    if gain.test:
        parts[f"{name} test"] = gain.test
    return parts


def _quoted(row: QuotedRow) -> dict[str, str]:
    line = {
        "arm": row.label,
        "model": row.model,
        "method": row.method,
        "kept": _as_printed(row.budget),
        **_printed_values(row.values),
    }
    if row.relative is not None:
        line["relative"] = _as_printed(row.relative)
    for key, difference in row.differences.items():
        line[f"{key} ours minus quoted"] = _number(difference)
    return {**line, "quoted": row.cite, "beside": row.beside or ""}


# As the paper prints them: digits that it does not give are not ours to add.
def _printed_values(values: Mapping[str, float]) -> dict[str, str]:
    return {key: _as_printed(value) for key, value in values.items()}


def _as_printed(value: float) -> str:
    return f"{value:.10g}"


# Four digits, where the Markdown has one: finer than one question of 20,000, which is 0.005 points.
def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
