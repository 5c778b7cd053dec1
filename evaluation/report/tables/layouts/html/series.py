"""Which mark and line a row has in the page: by shape and dash, so that none is told from another by colour alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prunetune.evaluation.report.tables.table import Row, Table

# Paths around the origin, some ten units wide.
SHAPES: Mapping[str, str] = {
    "circle": "M5 0A5 5 0 1 1 -5 0A5 5 0 1 1 5 0Z",
    "square": "M-4.4 -4.4H4.4V4.4H-4.4Z",
    "triangle": "M0 -5.6L5.4 4.2H-5.4Z",
    "diamond": "M0 -6.2L6.2 0L0 6.2L-6.2 0Z",
    "plus": "M-1.9 -5.6H1.9V-1.9H5.6V1.9H1.9V5.6H-1.9V1.9H-5.6V-1.9H-1.9Z",
    "wedge": "M0 5.6L5.4 -4.2H-5.4Z",
    "star": "M0 -6.6L1.9 -2.1L6.3 -2L2.9 1L4 5.6L0 3L-4 5.6L-2.9 1L-6.3 -2L-1.9 -2.1Z",
}
VARIANTS = ("training-free", "tuned", "elastic", "other")
"""Hollow and dashed, filled and solid, filled with long dashes, hollow and dotted, see report.css."""
_COLOURS = 7


@dataclass(frozen=True)
class Series:
    """The rows of one arm at several budgets.

    Attributes:
        label: of the rows.
        model: which model.
        shape: one of SHAPES: a training-free arm and those tuned from it share it.
        colour: number of a colour, shared alike.
        variant: one of VARIANTS: how mark and line are drawn.
        level: whether it is a dense arm, which is a level across the chart and no line of points.
    """

    label: str
    model: str
    shape: str
    colour: int
    variant: str
    level: bool


def series_of(table: Table) -> dict[str, Series]:
    """Return the series of each row by the row's id; no two series have shape and variant in common.

    Beyond seven methods of four variants there are no more marks, and they begin again in other colours.
    """
    found: dict[tuple[str, str], Series] = {}
    taken: set[tuple[int, str]] = set()
    numbers: dict[tuple[str, str], int] = {}
    for row in table.rows:
        if (row.model, row.label) in found:
            continue
        number = numbers.setdefault(_origin(row, table), len(numbers))
        variant: str = row.projector
        if (number, variant) in taken:  # tuned for two settings, say: another way of drawing, or another mark
            free = [one for one in VARIANTS if (number, one) not in taken and one != "training-free"]
            number, variant = (number, free[0]) if free else (len(numbers), variant)
            numbers.setdefault((row.model, row.label), number)
        taken.add((number, variant))
        found[row.model, row.label] = Series(
            label=row.label,
            model=row.model,
            shape=list(SHAPES)[number % len(SHAPES)],
            colour=(number + number // len(SHAPES)) % _COLOURS,
            variant=variant,
            level=row.method == "dense" and row.projector == "training-free",
        )
    return {row.id: found[row.model, row.label] for row in table.rows}


def _origin(row: Row, table: Table) -> tuple[str, str]:
    """Return model and label of the training-free row that a row was tuned from, or its own."""
    for other in table.rows:
        if other.id == row.twin:
            return other.model, other.label
    return row.model, row.label
