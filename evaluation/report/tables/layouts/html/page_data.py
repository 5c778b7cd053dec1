"""What the page's scripts draw, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from prunetune.evaluation.report.tables.layouts.examples import Answered, Example, Examples
from prunetune.evaluation.report.tables.layouts.grid import Grid, Heading, Line, cost_names, difference_cell, value_of
from prunetune.evaluation.report.tables.layouts.html.series import SHAPES, Series
from prunetune.evaluation.report.tables.table import QuotedRow, Row, Table, Value

_UP = ("relative", "value", "pooled", "hard", "kind")
"""What is drawn upwards, in the order of the choice."""


def page_data(table: Table, drawn: Grid, series: Mapping[str, Series], examples: Examples | None) -> dict[str, Any]:
    """Return the data of a page.

    Args:
        table: what is shown.
        drawn: the same as it is printed, with all columns.
        series: mark and line of each row by its id.
        examples: questions to show.
    """
    upwards = [heading for kind in _UP for heading in drawn.headings if heading.of == kind]
    kinds = list(dict.fromkeys(series.values()))
    inside = any(row.per_layer is not None for row in table.rows)
    tokens = "visual tokens per layer" if inside else "visual tokens"
    costs = [{"key": name, "title": name} for name in cost_names(table)]
    return {
        "shapes": SHAPES,
        "series": [asdict(one) for one in kinds],
        "across": [{"key": "tokens", "title": tokens}, *costs],
        "upwards": [{"key": one.key, "title": one.full, "digits": one.digits} for one in upwards],
        "rows": [_row(row, upwards, kinds.index(series[row.id])) for row in table.rows],
        "quoted": [_quoted(line, line.row, upwards) for line in drawn.quoted if isinstance(line.row, QuotedRow)],
        "examples": [] if examples is None else [_example(one) for one in examples.examples],
    }


def _row(row: Row, upwards: list[Heading], series: int) -> dict[str, Any]:
    gain = difference_cell(row.relative_gain, 1)
    return {
        "id": row.id,
        "label": row.label,
        "model": row.model,
        "series": series,
        "kept": row.kept,
        "projector": row.projector,
        "twin": row.twin,
        "gain": " ".join(part for part in (gain.text, gain.interval) if part),
        "across": {"tokens": [row.tokens], **_numbers(row.costs)},
        "upwards": _numbers({heading.key: value_of(row, heading) for heading in upwards}),
    }


def _numbers(values: Mapping[str, Value | None]) -> dict[str, list[float]]:
    """Return values by name: the number, and the ends of its interval if it has one."""
    found = {}
    for name, value in values.items():
        if value is not None and value.value is not None:
            found[name] = [value.value, *(value.interval or ())]
    return found


def _quoted(line: Line, row: QuotedRow, upwards: list[Heading]) -> dict[str, Any]:
    numbers = {}
    for heading in upwards:
        number = row.relative if heading.of == "relative" else row.values.get(heading.name)
        if number is not None and heading.of in ("relative", "value"):
            numbers[heading.key] = [number]
    return {"label": line.label, "across": {"tokens": [row.budget]}, "upwards": numbers}


def _example(example: Example) -> dict[str, Any]:
    picture = example.picture
    return {
        "task": example.task,
        "question": example.question,
        "answer": example.answer,
        "picture": f"data:{picture.media};base64,{picture.data}",
        "size": [picture.width, picture.height],
        "arms": {name: _answered(one) for name, one in example.arms.items()},
    }


def _answered(answered: Answered) -> dict[str, Any]:
    return {
        "said": answered.prediction,
        "score": answered.score,
        "grid": answered.grid,
        "kept": packed(answered.kept, answered.grid),
    }


def packed(positions: list[int], grid: tuple[int, int]) -> str:
    """Return positions as hexadecimal digits of four patches each, the first patch highest.

    Thirty arms' positions of 24 pictures are half a megabyte as numbers, and 100 KB like this.
    """
    kept = set(positions)
    bits = "".join("1" if position in kept else "0" for position in range(grid[0] * grid[1]))
    bits += "0" * (-len(bits) % 4)
    return "".join(f"{int(bits[start : start + 4], 2):x}" for start in range(0, len(bits), 4))
