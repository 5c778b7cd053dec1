"""Which columns a printed table has, and each cell's numbers as they are written; layouts add their syntax alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.report.tables.table import Column, Difference, QuotedRow, Row, Table, Value

SIGNIFICANT = 0.05
"""A difference is marked where its adjusted p is below."""
NONE = "—"
"""Stands where there is no number, with a note that says why."""

Of = Literal["layers", "value", "kind", "hard", "relative", "gain", "pooled", "cost"]
"""What a column shows of a row."""


@dataclass(frozen=True)
class Heading:
    """A column of the printed table.

    Attributes:
        of: what it shows.
        name: of what it shows: a column's key, a kind of question, a cost; what a gain is of.
        title: as it is printed, without unit.
        unit: "%", "points", "score" or empty.
        higher: whether more is better; None where neither is.
        digits: behind the point.
    """

    of: Of
    name: str
    title: str
    unit: str = "%"
    higher: bool | None = True
    digits: int = 1

    @property
    def key(self) -> str:
        """Names the heading within the table."""
        return f"{self.of} {self.name}".strip()

    @property
    def full(self) -> str:
        """Title, unit and an arrow where less is better."""
        unit = f" ({self.unit})" if self.unit in ("%", "points") else ""
        return f"{self.title}{unit}" + (" ↓" if self.higher is False else "")


@dataclass(frozen=True)
class Cell:
    """A number as it is written; all parts but ``number`` may be empty.

    Attributes:
        text: the number, a dash where a note says why there is none, or nothing.
        interval: "[60.1, 64.2]".
        spread: "± 0.3": over trainings.
        p: "p = 0.012" after the correction for many tests.
        significant: whether that is below SIGNIFICANT.
        note: number of the footnote, from 1.
        ours: "+0.4": our row's value minus this quoted one.
        number: what it is sorted by.
    """

    text: str = ""
    interval: str = ""
    spread: str = ""
    p: str = ""
    significant: bool = False
    note: int | None = None
    ours: str = ""
    number: float | None = None


@dataclass(frozen=True)
class Line:
    """A row of the printed table: whose it is, and a cell for each heading."""

    row: Row | QuotedRow
    label: str
    kept: str
    cells: list[Cell]


@dataclass
class Grid:
    """A table as it is printed.

    Attributes:
        headings: of the columns right of arm and visual tokens.
        lines: measured rows.
        quoted: rows from papers.
        notes: why a number is missing or special; cells name them by number from 1.
        legend: what marks and columns mean, and the table's own footnotes.
    """

    headings: list[Heading]
    lines: list[Line] = field(default_factory=list)
    quoted: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    legend: list[str] = field(default_factory=list)

    def note(self, text: str) -> int | None:
        """Return the number of a note, which is added if it is new; None of an empty one."""
        if not text:
            return None
        if text not in self.notes:
            self.notes.append(text)
        return self.notes.index(text) + 1


def grid(table: Table, also: Sequence[str] = (), mark: str = "bold") -> Grid:
    """Return the table as it is printed.

    Its columns: how many tokens a layer processes, if stages inside the LLM drop any; each benchmark's headline metric,
    with the accuracy of its hard part beside it; of a single benchmark the kinds of its questions before; the relative
    average; what tuning gains, if a row is tuned; last, of several benchmarks, the pooled accuracy.

    Args:
        table: what is drawn.
        also: further columns, see :func:`further`.
        mark: how the layout marks a significant difference, for the legend.

    Raises:
        TaskError: for a name in ``also`` that the table does not have.
    """
    drawn = Grid(_headings(table, also))
    drawn.lines += [_measured(row, drawn) for row in table.rows]
    drawn.quoted += [_quoted(row, drawn) for row in table.quoted]
    drawn.legend += _legend(table, drawn, mark)
    return drawn


def _headings(table: Table, also: Sequence[str]) -> list[Heading]:
    _check_names(table, also)
    headlines = [column for column in table.columns if column.headline]
    alone = len({column.task for column in headlines}) == 1
    found: list[Heading] = []
    if any(row.per_layer is not None for row in table.rows):
        found.append(Heading("layers", "", "tokens per layer", "", None))
    for column in table.columns:
        if (alone and column.headline) or f"{column.key} kinds" in also:
            found += _of_kinds(table, column, "" if alone else f"{column.task} ")
        if column.headline or column.key in also:
            found += _of_metric(table, column)
        if f"{column.key} gain" in also:
            found.append(_gain_of(table, column, f"{column.task} {column.metric}, tuned - training-free"))
    relative = [row.relative for row in table.rows]
    relative_quoted = [quote.relative for quote in table.quoted]
    if any(value is not None for value in (*relative, *relative_quoted)):
        found.append(Heading("relative", "", "of dense" if alone else "relative average"))
    found += [heading for heading in _gain(table, headlines) if heading.key not in {one.key for one in found}]
    for name in cost_names(table):
        if name in also:
            found.append(Heading("cost", name, name, "", False, 2))
    if not alone and any(row.pooled is not None for row in table.rows):
        found.append(Heading("pooled", "", "pooled accuracy"))
    return found


def further(table: Table) -> list[str]:
    """Return all columns that may be asked for: ``pope/accuracy``, ``pope/f1 gain``, ``pope/f1 kinds``, ``TFLOPs``."""
    names = []
    for column in table.columns:
        names.append(column.key)
        if any(column.key in row.gains for row in table.rows):
            names.append(f"{column.key} gain")
        if _kinds(table, column):
            names.append(f"{column.key} kinds")
    return names + cost_names(table)


def _check_names(table: Table, also: Sequence[str]) -> None:
    known = further(table)
    for name in also:
        if name not in known:
            raise TaskError(f"the table has no column {name!r}; it has {', '.join(known)}")


def cost_names(table: Table) -> list[str]:
    """Return the costs that some row has, in order of their first appearance."""
    return list(dict.fromkeys(name for row in table.rows for name in row.costs))


def _kinds(table: Table, column: Column) -> list[str]:
    return list(dict.fromkeys(kind for row in table.rows for kind in row.by_type.get(column.key, {})))


def _of_kinds(table: Table, column: Column, before: str) -> Iterator[Heading]:
    for kind in _kinds(table, column):
        name, digits = f"{column.key} {kind}", _digits(table, column)
        yield Heading("kind", name, f"{before}{kind}", column.unit, column.higher, digits)


def _of_metric(table: Table, column: Column) -> Iterator[Heading]:
    digits, title = _digits(table, column), f"{column.task} {column.metric}"
    yield Heading("value", column.key, title, column.unit, column.higher, digits)
    if column.headline and any(column.task in row.hard for row in table.rows):
        yield Heading("hard", column.task, f"{column.task} accuracy, hard part")


def _digits(table: Table, column: Column) -> int:
    """Return how many digits stand behind the point: one, and three of a score from 0 to 1 or so."""
    if column.unit != "score":
        return 1
    values = [row.values[column.key].value for row in table.rows if column.key in row.values]
    return 1 if any(abs(value) >= 10 for value in values if value is not None) else 3


def _gain(table: Table, headlines: Sequence[Column]) -> Iterator[Heading]:
    """Give the one column of what tuning gains: of the relative average, or of the only metric."""
    if any(row.relative_gain is not None for row in table.rows) and len(headlines) > 1:
        yield Heading("gain", "relative", "tuned - training-free, relative average", "points")
    elif len(headlines) == 1 and any(headlines[0].key in row.gains for row in table.rows):
        yield _gain_of(table, headlines[0], "tuned - training-free")
    elif any(row.pooled_gain is not None for row in table.rows):
        yield Heading("gain", "pooled", "tuned - training-free, pooled accuracy", "points")


def _gain_of(table: Table, column: Column, title: str) -> Heading:
    unit = "points" if column.unit == "%" else column.unit
    return Heading("gain", column.key, title, unit, column.higher, _digits(table, column))


def _measured(row: Row, drawn: Grid) -> Line:
    cells = []
    for heading in drawn.headings:
        if heading.of == "gain":
            cells.append(difference_cell(gain_of(row, heading.name), heading.digits))
        else:
            cells.append(_value_cell(value_of(row, heading), heading.digits, drawn))
    return Line(row, row.label, f"{row.kept:g}", cells)


def value_of(row: Row, heading: Heading) -> Value | None:
    """Return what a column other than a gain shows of a row."""
    if heading.of == "layers":
        return Value(value=row.tokens)
    if heading.of == "kind":
        key, _, kind = heading.name.partition(" ")
        return row.by_type.get(key, {}).get(kind)
    if heading.of == "relative":
        return row.relative
    if heading.of == "pooled":
        return row.pooled
    by_name = {"value": row.values, "hard": row.hard, "cost": row.costs}[heading.of]
    return by_name.get(heading.name)


def gain_of(row: Row, name: str) -> Difference | None:
    """Return a row's gain of the "relative" average, the "pooled" accuracy or a column."""
    if name == "relative":
        return row.relative_gain
    return row.pooled_gain if name == "pooled" else row.gains.get(name)


def _value_cell(value: Value | None, digits: int, drawn: Grid) -> Cell:
    if value is None:
        return Cell()
    note = drawn.note(value.note)
    if value.value is None:
        return Cell(NONE, note=note)
    # A spread of no trainings is not 0: of one there is none to write.
    spread = "" if value.between is None else f"± {value.between:.{digits}f}"
    low_high = "" if value.interval is None else "[{:.{d}f}, {:.{d}f}]".format(*value.interval, d=digits)
    return Cell(f"{value.value:.{digits}f}", low_high, spread, note=note, number=value.value)


def difference_cell(gain: Difference | None, digits: int) -> Cell:
    """Return a difference as it is written; empty and not 0 where there is none."""
    if gain is None:
        return Cell()
    low_high = "" if gain.interval is None else "[{:+.{d}f}, {:+.{d}f}]".format(*gain.interval, d=digits)
    significant = gain.adjusted is not None and gain.adjusted < SIGNIFICANT
    return Cell(
        f"{gain.value:+.{digits}f}", low_high, p=written_p(gain.adjusted), significant=significant, number=gain.value
    )


def written_p(p: float | None) -> str:
    """Return "p < 0.001" or "p = 0.012"; nothing of None."""
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _quoted(row: QuotedRow, drawn: Grid) -> Line:
    cells = []
    for heading in drawn.headings:
        cell = Cell()
        # No interval, no share of our dense arm, no gain: nothing is computed from a number that was not measured here.
        if heading.of == "value" and heading.name in row.values:
            ours = row.differences.get(heading.name)
            text = "" if ours is None else f"{ours:+.{heading.digits}f}"
            cell = Cell(f"{row.values[heading.name]:.10g}", ours=text, number=row.values[heading.name])
        elif heading.of == "relative" and row.relative is not None:
            cell = Cell(f"{row.relative:.10g}", number=row.relative)
        cells.append(cell)
    return Line(row, f"{row.label} (quoted: {row.cite})", f"{row.budget:g}", cells)


def _legend(table: Table, drawn: Grid, mark: str) -> list[str]:
    cells = [cell for line in (*drawn.lines, *drawn.quoted) for cell in line.cells]
    found = []
    for column in table.columns:
        if any(heading.of == "value" and heading.name == column.key for heading in drawn.headings):
            found.append(f"{column.task} {column.metric}: {column.about} ({column.items:,} questions)")
    if any(cell.interval for cell in cells):
        found.append("in brackets: 95 % interval")
    if any(cell.spread for cell in cells):
        found.append(f"±: standard deviation over {_trainings(table)} trainings; intervals are over images alone")
    tests = dict.fromkeys(gain.test for gain in _gains(table, drawn) if gain.test and gain.adjusted is not None)
    if any(cell.p for cell in cells):
        by = f" ({'; '.join(tests)})" if tests else ""
        found.append(f"p: after Holm's correction over all differences of the table{by}; {mark} below {SIGNIFICANT:g}")
    if any(cell.ours for cell in cells):
        found.append("quoted rows: the paper's number, and in parentheses our row's minus it")
    if any(row.relative is not None for row in table.quoted):
        found.append("a quoted relative average is the paper's own, as it defines it")
    return [*found, *table.footnotes]


def _trainings(table: Table) -> str:
    """Return "3", or "2 to 3", of the rows that have a spread."""
    values = [value for row in table.rows for value in (*row.values.values(), row.relative, row.pooled)]
    seeds = {value.seeds for value in values if value is not None and value.between is not None}
    return " to ".join(str(number) for number in sorted({min(seeds, default=2), max(seeds, default=2)}))


def _gains(table: Table, drawn: Grid) -> Iterator[Difference]:
    for heading in drawn.headings:
        for row in table.rows:
            gain = gain_of(row, heading.name) if heading.of == "gain" else None
            if gain is not None:
                yield gain
