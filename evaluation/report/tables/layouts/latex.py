"""A table as LaTeX: booktabs, and nothing else that a document would have to load."""

from __future__ import annotations

import re
from collections.abc import Sequence

from prunetune.evaluation.report.tables.layouts.grid import Cell, Grid, Heading, Line, grid
from prunetune.evaluation.report.tables.table import Row, Table

_COMMANDS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "↓": r"$\downarrow$",
    "—": "---",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
}
_MARKS = re.compile("|".join(re.escape(mark) for mark in _COMMANDS))
_BEST = ("value", "kind", "hard", "relative", "pooled")


def to_latex(
    table: Table, also: Sequence[str] = (), caption: str | None = None, label: str | None = None, intervals: bool = True
) -> str:
    """Return the table as a LaTeX float that needs ``booktabs`` alone.

    Numbers are aligned at the point, intervals stand small beside them, and among the tuned rows of one model and
    budget the best is bold. A significant gain has an asterisk.

    Args:
        table: what is drawn.
        also: further columns, see :func:`~prunetune.evaluation.report.tables.layouts.grid.grid`.
        caption: None takes the title.
        label: None makes one of the title: ``tab:main-table``.
        intervals: whether intervals, spreads and p are printed; a narrow page may have no room for them.

    Raises:
        TaskError: for a name in ``also`` that the table does not have.
    """
    drawn = grid(table, also, mark="asterisk")
    beside = []
    for number in range(len(drawn.headings)):
        beside.append(_has_marks(drawn, number) or (intervals and _has_intervals(drawn, number)))
    best = _best(drawn)
    rows = [_row(line, drawn, beside, best, intervals) for line in drawn.lines]
    quoted = [_row(line, drawn, beside, best, intervals) for line in drawn.quoted]
    title = table.title if caption is None else caption
    name = re.sub("[^a-z0-9]+", "-", table.title.lower()).strip("-") or "results"
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table*}",
            r"  \centering\small\setlength{\tabcolsep}{4pt}",
            rf"  \caption{{{escaped(title)}}}\smallskip",
            rf"  \label{{{f'tab:{name}' if label is None else label}}}",
            rf"  \begin{{tabular}}{{lr{''.join(_columns(both) for both in beside)}}}",
            r"    \toprule",
            *_header(drawn.headings, beside),
            r"    \midrule",
            *rows,
            *([r"    \midrule", *quoted] if quoted else []),
            r"    \bottomrule",
            r"  \end{tabular}",
            *_below(drawn),
            r"\end{table*}",
            "",
        ]
    )


def escaped(text: str) -> str:
    """Return text that LaTeX prints as it is, on one line."""
    return _MARKS.sub(lambda found: _COMMANDS[found[0]], " ".join(text.split()))


def _column(drawn: Grid, number: int) -> list[Cell]:
    return [line.cells[number] for line in (*drawn.lines, *drawn.quoted)]


def _has_intervals(drawn: Grid, number: int) -> bool:
    return any(cell.interval or cell.spread or cell.p for cell in _column(drawn, number))


def _has_marks(drawn: Grid, number: int) -> bool:
    return any(cell.note or cell.ours or cell.significant for cell in _column(drawn, number))


# A column of its own for what stands beside a number: right-aligned numbers of equal digits then share their points.
def _columns(both: bool) -> str:
    return r"r@{\,}l" if both else "r"


def _header(headings: Sequence[Heading], beside: Sequence[bool]) -> list[str]:
    """Return two lines: titles, and below them the units."""
    titles, units = ["arm", "tokens"], ["", ""]
    for heading, both in zip(headings, beside, strict=True):
        arrow = " ↓" if heading.higher is False else ""
        wide = r"\multicolumn{2}{c}{%s}" if both else "%s"
        titles.append(wide % escaped(heading.title + arrow))
        units.append(wide % escaped(heading.unit if heading.unit in ("%", "points") else ""))
    return [rf"    {' & '.join(titles)} \\", rf"    {' & '.join(units)} \\"]


def _row(line: Line, drawn: Grid, beside: Sequence[bool], best: set[tuple[str, int]], intervals: bool) -> str:
    cells = [escaped(line.label), escaped(line.kept)]
    for number, (cell, both) in enumerate(zip(line.cells, beside, strict=True)):
        text = escaped(cell.text) + _missing_digits(cell.text, drawn.headings[number])
        bold = isinstance(line.row, Row) and (line.row.id, number) in best
        cells.append(rf"\textbf{{{text}}}" if bold else text)
        if both:
            cells.append(_beside(cell, intervals))
    # In braces: a bracket that begins a row would be read as an option of the line end before it.
    cells[0] = f"{{{cells[0]}}}" if cells[0].startswith(("[", "*")) else cells[0]
    return rf"    {' & '.join(cells)} \\"


def _missing_digits(text: str, heading: Heading) -> str:
    """Return the room of the digits that a paper does not print, so that its number stands at the same point."""
    if not text or not heading.digits or "." in text or not text[-1].isdigit():
        return ""
    return rf"\phantom{{.{'0' * heading.digits}}}"


def _beside(cell: Cell, intervals: bool) -> str:
    """Return what stands small at the right of a number."""
    marks = "" if cell.note is None else str(cell.note)
    marks += "*" if cell.significant else ""
    raised = f"$^{{{marks}}}$" if marks else ""
    parts = [cell.spread, cell.interval, cell.p] if intervals else []
    parts.append(f"({cell.ours})" if cell.ours else "")
    told = " ".join(part for part in parts if part)
    return raised + (rf"{{\scriptsize {escaped(told)}}}" if told else "")


def _best(drawn: Grid) -> set[tuple[str, int]]:
    """Return row id and column of the best among the tuned rows of one model and budget."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in drawn.lines:
        if isinstance(line.row, Row) and line.row.projector in ("tuned", "elastic"):
            groups.setdefault((line.row.model, line.row.budget), []).append(line)
    found = set()
    for lines in groups.values():
        for number, heading in enumerate(drawn.headings):
            if heading.of in _BEST:
                found |= {(name, number) for name in _winners(lines, number, heading)}
    return found


def _winners(lines: Sequence[Line], number: int, heading: Heading) -> list[str]:
    """Return the ids of the rows with the best number as it is printed: nobody sees who is ahead by less."""
    numbers = [(round(cell.number, heading.digits), line) for line in lines
               if (cell := line.cells[number]).number is not None]  # fmt: skip
    if not numbers:
        return []
    choose = min if heading.higher is False else max
    top = choose(value for value, _ in numbers)
    return [line.row.id for value, line in numbers if value == top and isinstance(line.row, Row)]


def _below(drawn: Grid) -> list[str]:
    notes = [rf"$^{{{number}}}$ {escaped(note)}" for number, note in enumerate(drawn.notes, start=1)]
    lines = [*notes, *(escaped(footnote) for footnote in drawn.legend)]
    if not lines:
        return []
    return [r"  \par\smallskip", r"  {\footnotesize\raggedright", *(rf"  {line}\par" for line in lines), "  }"]
