"""A table as Markdown, for terminals and repositories."""

from __future__ import annotations

import re
from collections.abc import Sequence

from prunetune.evaluation.report.tables.layouts.grid import Cell, Line, grid
from prunetune.evaluation.report.tables.table import Table

# What would end a cell, begin a tag or change the font. Underscores within a word are safe, and names have many.
_MARKS = re.compile(r"[\\|`*]|<(?=[A-Za-z/!?])|(?<![^\W_])_|_(?![^\W_])")
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def to_markdown(table: Table, also: Sequence[str] = ()) -> str:
    """Return the table as Markdown: the title, the rows, quoted ones last, then the footnotes.

    Args:
        table: what is drawn.
        also: further columns, see :func:`~prunetune.evaluation.report.tables.layouts.grid.grid`.

    Raises:
        TaskError: for a name in ``also`` that the table does not have.
    """
    drawn = grid(table, also)
    header = ["arm", "visual tokens", *(escaped(heading.full) for heading in drawn.headings)]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    # Quoted rows last, whatever their budget: the order of the others means something, and theirs does not.
    for line in (*drawn.lines, *drawn.quoted):
        lines.append(_cells(line))
    text = f"# {escaped(table.title)}\n\n" if table.title else ""
    text += "".join(f"| {' | '.join(line)} |\n" for line in lines)
    below = [f"{_raised(number)} {note}" for number, note in enumerate(drawn.notes, start=1)] + drawn.legend
    if below:
        text += "\n" + "".join(f"- {escaped(footnote)}\n" for footnote in below)
    return text


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return _MARKS.sub(lambda found: "\\" + found[0], " ".join(text.split()))


def _cells(line: Line) -> list[str]:
    return [escaped(line.label), line.kept, *(_cell(cell) for cell in line.cells)]


def _cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.significant else cell.text
    for part in (cell.spread, cell.interval):
        if part:
            text += f" {part}"
    if cell.p:
        text += f", {cell.p}"
    if cell.ours:
        text += f" ({cell.ours})"
    return text if cell.note is None else text + _raised(cell.note)


def _raised(number: int) -> str:
    return str(number).translate(_RAISED)
