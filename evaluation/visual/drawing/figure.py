"""One figure a question: the picture with the dense answer, a row a method, a column a budget, maps and a legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prunetune.evaluation.visual.drawing.png import paint
from prunetune.evaluation.visual.drawing.shapes import Box, Group, Shape, Stroke, Words, wrapped
from prunetune.evaluation.visual.drawing.svg import to_svg
from prunetune.evaluation.visual.drawing.tokens import heat, limits, pictures, tokens
from prunetune.evaluation.visual.drawn import Cell, Drawing, Line, Said, mark_of, told_budget, told_counts
from prunetune.evaluation.visual.states import OUTSIDE

_MARGIN = 22.0
_LABEL = 124.0
_GAP = 18.0
_NARROWEST = 150.0


@dataclass(frozen=True)
class Figure:
    """Shapes on a sheet of some width and height, in points."""

    shapes: Sequence[Shape]
    width: float
    height: float
    about: str


def write_png(drawing: Drawing, path: Path) -> None:
    """Draw a question's figure as PNG."""
    figure = figure_of(drawing)
    paint(figure.shapes, figure.width, figure.height).save(path)


def write_svg(drawing: Drawing, path: Path) -> None:
    """Draw a question's figure as SVG: a rectangle for every token, the pictures within the file."""
    figure = figure_of(drawing)
    path.write_text(to_svg(figure.shapes, figure.width, figure.height, figure.about), encoding="utf-8")


def figure_of(drawing: Drawing) -> Figure:
    """Return a question's figure as shapes."""
    sheet = drawing.sheet
    wide = max(sheet.width, _NARROWEST)
    columns = len(drawing.columns)
    inner = max(_LABEL + columns * (wide + _GAP) - _GAP, _LABEL + 2 * wide + _GAP, 540.0)
    cursor = _Cursor(_MARGIN)
    shapes: list[Shape] = []

    shapes += cursor.words(drawing.question, _MARGIN, inner, 15.0, bold=True)
    told = drawing.source if drawing.answer is None else f"right: {drawing.answer}; {drawing.source}"
    shapes += cursor.words(told, _MARGIN, inner, 9.5, "quiet")
    cursor.y += 12.0

    left = _MARGIN + _LABEL
    label = [("dense", 12.0, True, "ink"), (f"all {drawing.tokens} tokens", 9.5, False, "quiet")]
    shapes += _labelled(label, cursor.y)
    own: list[Shape] = pictures(sheet, left, cursor.y, names=True)
    below = _Cursor(cursor.y + sheet.height + 4.0)
    own += _answer(below, drawing.dense, left, wide)
    shapes.append(Group(own, f"the {drawing.about}; dense answer: {told_said(drawing.dense)}", {"arm": "dense"}))
    cursor.y = below.y + 14.0

    shapes.append(Stroke("rule", _MARGIN, cursor.y, _MARGIN + inner, cursor.y))
    cursor.y += 6.0
    heading = cursor.y
    for number, budget in enumerate(drawing.columns):
        at = _Cursor(heading)
        shapes += at.words(told_budget(budget), left + number * (wide + _GAP), wide, 12.0, bold=True)
        cursor.y = at.y + 4.0
    for line in drawing.lines:
        shapes += _row(drawing, line, cursor, left, wide)
    if drawing.maps:
        shapes += _maps(drawing, cursor, left, wide, _MARGIN + inner)
    shapes += _legend(drawing, cursor)
    height = cursor.y + _MARGIN
    width = inner + 2 * _MARGIN
    about = f"{drawing.question} {len(drawing.lines)} methods at {columns} budgets, of {drawing.tokens} visual tokens"
    return Figure([Box("ground", 0.0, 0.0, width, height), *shapes], width, height, about)


def told_said(said: Said) -> str:
    """Return an answer in words."""
    right = "" if said.score is None else (", right" if said.score >= 0.5 else ", wrong")
    return f"{said.text or '(nothing)'}{right}"


def told_cell(line: Line, cell: Cell, drawing: Drawing, column: int) -> str:
    """Return a cell in words, for those who don't see it."""
    budget = told_budget(drawing.columns[column])
    return f"{line.label} at {budget}: {told_counts(cell, drawing.tokens)}; answer: {told_said(cell.said)}"


@dataclass
class _Cursor:
    """How far down a column of shapes goes."""

    y: float

    def words(
        self, text: str, left: float, width: float, size: float, ink: str = "ink", bold: bool = False
    ) -> list[Shape]:
        """Return a text in lines, and go below them."""
        found: list[Shape] = []
        for line in wrapped(text, width, size, bold):
            self.y += size * 1.3
            found.append(Words(line, left, self.y - size * 0.3, size, ink, bold))
        return found


def _labelled(lines: Sequence[tuple[str, float, bool, str]], top: float) -> list[Shape]:
    cursor = _Cursor(top)
    found: list[Shape] = []
    for text, size, bold, ink in lines:
        if text:
            found += cursor.words(text, _MARGIN, _LABEL - 14.0, size, ink, bold)
    return found


def _answer(cursor: _Cursor, said: Said, left: float, width: float) -> list[Shape]:
    ink = "ink" if said.score is None else ("right" if said.score >= 0.5 else "wrong")
    return cursor.words(f"{mark_of(said)}{said.text or '(nothing)'}", left, width, 11.0, ink)


def _row(drawing: Drawing, line: Line, cursor: _Cursor, left: float, wide: float) -> list[Shape]:
    top, lowest = cursor.y, cursor.y
    shapes = _labelled([(line.label, 12.0, True, "ink"), (line.about, 9.5, False, "quiet")], top)
    for column in range(len(drawing.columns)):
        x = left + column * (wide + _GAP)
        cell = line.cells.get(column)
        if cell is None:
            shapes += _Cursor(top).words("not at this budget", x, wide, 9.5, "quiet")
            continue
        own: list[Shape] = pictures(drawing.sheet, x, top)
        own += tokens(drawing.sheet, cell.states, x, top)
        below = _Cursor(top + drawing.sheet.height + 4.0)
        own += _answer(below, cell.said, x, wide)
        own += below.words(told_counts(cell, drawing.tokens), x, wide, 8.5, "quiet")
        data = {"arm": line.label, "budget": str(drawing.columns[column])}
        shapes.append(Group(own, told_cell(line, cell, drawing, column), data))
        lowest = max(lowest, below.y)
    for shape in shapes:
        if isinstance(shape, Words):
            lowest = max(lowest, shape.top)
    cursor.y = lowest + 16.0
    return shapes


def _maps(drawing: Drawing, cursor: _Cursor, left: float, wide: float, end: float) -> list[Shape]:
    """Return all maps, as many beside one another as there is room for."""
    shapes: list[Shape] = [Stroke("rule", _MARGIN, cursor.y, end, cursor.y)]
    cursor.y += 8.0
    lines = [("what methods go by", 12.0, True, "ink"), ("dark is little, light is much", 9.5, False, "quiet")]
    shapes += _labelled(lines, cursor.y)
    across = max(1, int((end - left + _GAP) // (wide + _GAP)))
    for first in range(0, len(drawing.maps), across):
        lowest = cursor.y
        titles = [wrapped(own.title, wide, 9.5, True) for own in drawing.maps[first : first + across]]
        room = max(len(lines) for lines in titles) * 9.5 * 1.3
        for number, shown in enumerate(drawing.maps[first : first + across]):
            x = left + number * (wide + _GAP)
            own = _Cursor(cursor.y).words(shown.title, x, wide, 9.5, bold=True)
            top = cursor.y + room + 4.0
            own += heat(drawing.sheet, shown, x, top, f"map-{first + number}")
            below = _Cursor(top + drawing.sheet.height + 4.0)
            told = told_limits(*limits(shown), ", ".join(shown.methods))
            own += below.words(told, x, wide, 8.5, "quiet")
            shapes.append(Group(own, f"{shown.title}: {told}", {"map": shown.title}))
            lowest = max(lowest, below.y)
        cursor.y = lowest + 12.0
    return shapes


def told_limits(low: float, high: float, methods: str) -> str:
    """Return what a map's ends mean and who reads it."""
    return f"{low:.3g} to {high:.3g}; read by {methods}"


def _legend(drawing: Drawing, cursor: _Cursor) -> list[Shape]:
    """Return a swatch and words for each state that occurs."""
    seen: dict[str, int] = {}
    for line in drawing.lines:
        for cell in line.cells.values():
            seen["outside"] = seen.get("outside", 0) + int((cell.states.state == OUTSIDE).sum())
            seen["foreign"] = seen.get("foreign", 0) + int(cell.states.foreign.sum())
            for word, number in cell.states.counts().items():
                seen[word] = seen.get(word, 0) + number
    told = [
        ("kept", "kept"),
        ("foreign", "gives its place to [CLS] or a mean"),
        ("merged", "merged into the outlined token at the stroke's end"),
        ("inside", "reaches the LLM, dropped between its layers"),
        ("dropped", "dropped before the LLM"),
        ("outside", "padding that the model cuts away"),
    ]
    shapes: list[Shape] = []
    x = _MARGIN
    cursor.y += 4.0
    for kind, words in told:
        if not seen.get(kind):
            continue
        shapes += _swatch(kind, x, cursor.y)
        (line_of,) = wrapped(words, 1e6, 9.0)
        after = x + (40.0 if kind == "merged" else 20.0)
        shapes.append(Words(line_of, after, cursor.y + 10.5, 9.0, "quiet"))
        x = after + 5.0 * len(words) + 22.0
        if x > _MARGIN + 420.0:
            x = _MARGIN
            cursor.y += 20.0
    cursor.y += 16.0
    return shapes


def _swatch(kind: str, x: float, y: float) -> list[Shape]:
    found: list[Shape] = [Box("swatch", x, y, 14.0, 14.0)]
    if kind == "merged":
        found += [
            Box("swatch", x + 20.0, y, 14.0, 14.0),
            Box("merged", x, y, 14.0, 14.0),
            Stroke("link-0", x + 7.0, y + 7.0, x + 27.0, y + 7.0),
            Box("dot-0", x + 5.9, y + 5.9, 2.2, 2.2),
            Box("centre-0", x + 21.0, y + 1.0, 12.0, 12.0),
        ]
        return found
    if kind == "inside":
        return [*found, Box("inside", x, y, 14.0, 14.0), Stroke("cross", x + 3.0, y + 11.0, x + 11.0, y + 3.0)]
    if kind in ("kept", "foreign"):
        found.append(Box("kept", x + 0.5, y + 0.5, 13.0, 13.0))
        if kind == "foreign":
            found += [Stroke("cross", x + 3.0, y + 7.0, x + 11.0, y + 7.0)]
            found += [Stroke("cross", x + 7.0, y + 3.0, x + 7.0, y + 11.0)]
        return found
    return [*found, Box(kind, x, y, 14.0, 14.0)]
