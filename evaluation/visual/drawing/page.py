"""One page of HTML for all questions: a slider over budgets, no network, readable without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from prunetune.evaluation.report.pages import content_policy
from prunetune.evaluation.visual.drawing.figure import told_cell, told_limits, told_said
from prunetune.evaluation.visual.drawing.shapes import Picture, Shape
from prunetune.evaluation.visual.drawing.svg import compact, image_of, pictures_in, style
from prunetune.evaluation.visual.drawing.tokens import heat, limits, pictures, tokens
from prunetune.evaluation.visual.drawn import Drawing, Line, Said, mark_of, told_budget, told_counts
from prunetune.outputs import write_text

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class _Shown:
    """A drawing on the page: the inside of an SVG with what it says.

    Attributes:
        column: the number of its budget, -1 for none.
        heading: above it.
        inside: of the SVG; empty where the method has no such budget.
        about: in words, for those who don't see it.
        said: the answer with its mark; empty for none.
        verdict: "right", "wrong" or "".
        beside: small print.
    """

    column: int
    heading: str
    inside: str
    about: str = ""
    said: str = ""
    verdict: str = ""
    beside: str = ""


@dataclass(frozen=True)
class _Part:
    """A question with all that is shown of it."""

    drawing: Drawing
    anchor: str
    defined: str
    picture: _Shown
    lines: Sequence[tuple[Line, Sequence[_Shown]]]
    maps: Sequence[_Shown]


def write_page(drawings: Sequence[Drawing], model: str, path: Path) -> None:
    """Write the page.

    Args:
        drawings: the questions, of which all have the same columns.
        model: what the model is called.
        path: of the file.
    """
    looks = (_HERE / "kept.css").read_text(encoding="utf-8") + style()
    script = (_HERE / "kept.js").read_text(encoding="utf-8")
    # Questions, answers and names of files are text from elsewhere, which the template escapes.
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    columns = [told_budget(budget) for budget in drawings[0].columns] if drawings else []
    page = environment.get_template("kept.html").render(
        parts=[_part(drawing) for drawing in drawings],
        columns=columns,
        model=model,
        policy=content_policy(looks, script),
        style=looks,
        script=script,
    )
    write_text(path, page)


def _part(drawing: Drawing) -> _Part:
    use = f"{drawing.name}-"
    plain = pictures(drawing.sheet, 0.0, 0.0, names=True)
    named: list[Shape] = list(plain)
    maps = []
    for number, shown in enumerate(drawing.maps):
        cells = heat(drawing.sheet, shown, 0.0, 0.0, f"map-{number}")
        named += cells
        told = told_limits(*limits(shown), ", ".join(shown.methods))
        maps.append(_Shown(-1, shown.title, compact(cells, use), f"{shown.title}: {told}", beside=told))
    defined: dict[str, Picture] = {picture.key: picture for picture in pictures_in(named)}
    return _Part(
        drawing=drawing,
        anchor=drawing.name.replace("_", "-"),
        defined="".join(image_of(picture, f"{use}{key}") for key, picture in defined.items()),
        picture=_Shown(
            -1,
            "",
            compact(plain, use),
            f"the {drawing.about}; dense answer: {told_said(drawing.dense)}",
            f"{mark_of(drawing.dense)}{drawing.dense.text or '(nothing)'}",
            _verdict(drawing.dense),
            f"all {drawing.tokens} tokens",
        ),
        lines=[(line, _cells(drawing, line, use)) for line in drawing.lines],
        maps=maps,
    )


def _cells(drawing: Drawing, line: Line, use: str) -> list[_Shown]:
    found = []
    for column, budget in enumerate(drawing.columns):
        cell = line.cells.get(column)
        if cell is None:
            found.append(_Shown(column, told_budget(budget), ""))
            continue
        shapes = [*pictures(drawing.sheet, 0.0, 0.0), *tokens(drawing.sheet, cell.states, 0.0, 0.0)]
        found.append(
            _Shown(
                column,
                told_budget(budget),
                compact(shapes, use),
                told_cell(line, cell, drawing, column),
                f"{mark_of(cell.said)}{cell.said.text or '(nothing)'}",
                _verdict(cell.said),
                told_counts(cell, drawing.tokens),
            )
        )
    return found


def _verdict(said: Said) -> str:
    if said.score is None:
        return ""
    return "right" if said.score >= 0.5 else "wrong"
