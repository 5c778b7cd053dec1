"""Results as images: accuracy over budget, and answers with what was kept of their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from prunetune.evaluation.report.tables.table import Row, Table, Value

_MARKS = (("D", 7), ("X", 9), ("P", 9), ("v", 8), ("s", 7))
"""Markers with their sizes of projectors that are neither the base's nor tuned for the row alone."""


@lru_cache(maxsize=1)
def pyplot() -> Any:
    """Return matplotlib's plotting, imported when something is drawn: reading results never waits for it."""
    import matplotlib

    matplotlib.use("Agg")  # a server has no display, and the default backend would look for one
    from matplotlib import pyplot as plotting

    return plotting


def plot_table(table: Table, path: Path) -> None:
    """Draw a table over kept visual tokens: a line per training-free method, a mark for each kind of projector.

    Its height is the metric of a single benchmark, of several the relative average, without a dense arm the pooled
    accuracy. Nothing is drawn where all answers are hidden.
    """
    plt = pyplot()
    with plt.rc_context({"text.parse_math": False}):  # what stands between two dollars of a name is no formula
        figure, axes = plt.subplots(figsize=(7, 4.2), dpi=130)
        _draw(table, axes)
        figure.tight_layout()
        figure.savefig(path)
    plt.close(figure)  # pyplot keeps every figure that is not closed


def _draw(table: Table, axes: Any) -> None:
    name, values = _heights(table)
    rows = [row for row in table.rows if values[row.id].value is not None]
    labels = sorted({row.label for row in rows if not _dense(row)})  # so that a method's colour stays what it is
    colors = _colors(labels)
    marks = _marks(labels)
    for row in rows:
        # Dense is a line across the plot: it has no budget, and every method is read against it.
        if _dense(row):
            height = values[row.id].value
            axes.axhline(height, color="black", linewidth=1, linestyle="--")
            at = (0.99, height)
            axes.annotate(row.label, at, xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    # By label and not by method: two sets of options are two lines, and a tuned arm stands beside its twin.
    for label in labels:
        points = [row for row in rows if row.label == label]
        points.sort(key=lambda row: row.tokens)
        _points(axes, points, values, colors[label], marks[label])
    axes.set_xscale("log", base=2)  # budgets are halved from one to the next
    # At the budgets themselves, of which there are few; the powers of two between them were measured by nobody.
    ticks = sorted({row.tokens for row in rows if not _dense(row)})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    inside = any(row.per_layer is not None for row in rows)
    axes.set_xlabel("visual tokens per image" + (", mean over the LLM's layers" if inside else ""))
    axes.set_ylabel(name)
    axes.grid(alpha=0.3)
    if labels:
        axes.legend(fontsize=8)


def _dense(row: Row) -> bool:
    return row.method == "dense" and row.projector == "training-free"


def _heights(table: Table) -> tuple[str, dict[str, Value]]:
    """Return what is drawn of each row, and its name."""
    headlines = [column for column in table.columns if column.headline]
    nothing = Value(value=None)
    if len(headlines) == 1:
        (column,) = headlines
        name = f"{column.task} {column.metric}" + (f", {column.unit}" if column.unit != "score" else "")
        return name, {row.id: row.values[column.key] for row in table.rows}
    if any(row.relative is not None for row in table.rows):
        return "relative average, % of dense", {row.id: row.relative or nothing for row in table.rows}
    return "pooled accuracy, %", {row.id: row.pooled or nothing for row in table.rows}


def _colors(labels: list[str]) -> dict[str, Any]:
    """Return a colour for each label; a tuned arm has its method's."""
    palette = pyplot().get_cmap("tab10").colors
    by_method: dict[str, Any] = {}
    colors = {}
    for label in labels:
        method = label.partition(" + ")[0]
        if method not in by_method:
            by_method[method] = palette[len(by_method) % len(palette)]
        colors[label] = by_method[method]
    return colors


def _marks(labels: list[str]) -> dict[str, tuple[str, int, float]]:
    """Return marker, size and place of each label, alike for one kind of projector: two of a method are told apart.

    The place is a factor of the budget: kinds stand a little beside it, so that none hides another.
    """
    kinds = sorted({label.partition(" + ")[2] for label in labels} - {"", "tuned projector"})
    by_kind = {"": ("o", 5, 1.0), "tuned projector": ("*", 12, 1.04)}
    for number, kind in enumerate(kinds):
        by_kind[kind] = (*_MARKS[number % len(_MARKS)], 1.04 ** (number + 2))
    return {label: by_kind[label.partition(" + ")[2]] for label in labels}


def _points(axes: Any, rows: list[Row], values: Mapping[str, Value], color: Any, mark: tuple[str, int, float]) -> None:
    """Draw the arms of one label; all of them are tuned, or none is."""
    marker, size, place = mark
    style = f"{marker}-" if rows[0].projector == "training-free" else f"{marker}--"
    heights = np.array([values[row.id].value for row in rows], dtype=float)
    # Without an interval the whisker is as short as can be.
    ends = np.array([values[row.id].interval or (height, height) for row, height in zip(rows, heights, strict=True)])
    axes.errorbar(
        [row.tokens * place for row in rows],
        heights,
        # matplotlib takes lengths, not ends, and none below zero: a metric that is no mean may lie outside.
        yerr=np.clip([heights - ends[:, 0], ends[:, 1] - heights], 0, None),
        fmt=style,
        color=color,
        markersize=size,
        linewidth=1.2,
        capsize=2,
        label=rows[0].label,
    )


@dataclass(frozen=True)
class Shown:
    """What an arm keeps of a picture, and what it answers.

    Attributes:
        label: of the arm.
        positions: the kept ones in raster order.
        answer: the arm's.
        right: whether it scores.
    """

    label: str
    positions: np.ndarray
    answer: str
    right: bool


def answers_figure(rows: Sequence[tuple[str, str, np.ndarray, tuple[int, int], Sequence[Shown]]], path: Path) -> None:
    """Draw a row for each question: the picture with the question, then what each arm keeps of it and answers.

    Args:
        rows: question, right answer, pixels (H, W, 3), rows and columns of the patch grid, and the arms.
        path: of the PNG file.
    """
    plt = pyplot()
    columns = 1 + len(rows[0][-1])
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.9 * columns, 2.35 * len(rows)), dpi=130, squeeze=False)
    for number, (own, (question, answer, pixels, grid, panels)) in enumerate(zip(axes, rows, strict=True)):
        own[0].imshow(pixels)
        own[0].set_xlabel(f"{fill(question, 26)}\n({answer})", fontsize=7)
        for place, panel in zip(own[1:], panels, strict=True):
            light = 0.2 + 0.8 * _mask(panel.positions, grid, pixels.shape)
            place.imshow((pixels * light).astype(np.uint8))
            # A mark and not a colour alone: the figure is read in grey as well.
            mark, color = ("\u2713", "#1b6e3c") if panel.right else ("\u2717", "#a3241c")
            place.set_xlabel(f"{mark} {fill(panel.answer or '(nothing)', 24)}", fontsize=8, color=color)
            if number == 0:
                place.set_title(f"{panel.label}", fontsize=8)
        for place in own:
            place.set_xticks([])
            place.set_yticks([])
    axes[0][0].set_title("picture and question", fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _mask(positions: np.ndarray, grid: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """Return an array (H, W, 1) of ones where a kept patch is and zeros elsewhere."""
    rows, columns = grid
    patches = np.zeros(rows * columns)
    patches[positions] = 1
    # Each pixel looks its patch up, which also works where the sides are no multiples of the grid's.
    row = np.arange(shape[0]) * rows // shape[0]
    column = np.arange(shape[1]) * columns // shape[1]
    return patches.reshape(rows, columns)[row[:, None], column[None, :], None]
