"""Figures as PNG and SVG, in colours that colour-blind readers and grey prints tell apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from prunetune.evaluation.report.plot import pyplot

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#8A7A00")
"""Okabe and Ito's, whose yellow is darkened: it can't be seen on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
SEQUENTIAL = "cividis"
"""From dark to light for every reader, and in grey."""


@contextmanager
def drawn(
    folder: Path, name: str, title: str, size: tuple[float, float], rows: int = 1, columns: int = 1
) -> Iterator[Any]:
    """Yield a figure's axes (rows, columns); write ``NAME.png`` and ``NAME.svg`` as the block ends.

    Args:
        folder: of the files.
        name: of the figure.
        title: above it.
        size: width and height in inches.
        rows: of axes.
        columns: of axes.
    """
    plt = pyplot()
    # The same figure is the same file: ids of an SVG are random otherwise, and its date is today's.
    # And names are names: what stands between two dollars would be read as a formula, and fail as one.
    options = {"svg.hashsalt": "prunetune", "font.size": 8, "axes.titlesize": 9, "text.parse_math": False}
    with plt.rc_context(options):
        figure, axes = plt.subplots(rows, columns, figsize=size, dpi=130, squeeze=False, layout="constrained")
        try:
            figure.suptitle(title, fontsize=10)
            yield axes
            figure.savefig(folder / f"{name}.png", metadata={"Software": None})
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        finally:
            plt.close(figure)  # pyplot keeps every figure that is not closed


def legend_below(axes: Any, columns: int = 2, source: Any = None) -> None:
    """Put the legend of one of a figure's axes below all of them, where it hides nothing.

    Args:
        axes: the figure's.
        columns: of the legend.
        source: the axes whose series it names; None is the first.
    """
    source = axes[0][0] if source is None else source
    handles, labels = source.get_legend_handles_labels()
    source.figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=7)


def named(name: str) -> str:
    """Return a name of a series for the legend, which leaves out those that begin with an underscore."""
    return f"\u200a{name}" if name.startswith("_") else name


def style(number: int) -> dict[str, Any]:
    """Return colour, marker and line of the ``number``-th series; each of the three tells it from its neighbours."""
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number % len(LINES)],
    }


def whiskers(axes: Any, places: Sequence[float], estimates: Sequence[Any], upright: bool = False, **how: Any) -> None:
    """Draw estimates as points with their intervals.

    Args:
        axes: where.
        places: of the points along the other axis.
        estimates: with value, low and high.
        upright: whether values are heights; else they go to the right.
        how: of the points.
    """
    values = np.array([one.value for one in estimates], dtype=float)
    low = np.array([one.value if one.low is None else one.low for one in estimates], dtype=float)
    high = np.array([one.value if one.high is None else one.high for one in estimates], dtype=float)
    # matplotlib takes lengths, none below zero: a value that is no mean may lie outside of its interval.
    lengths = np.clip([values - low, high - values], 0, None)
    options = {"linestyle": "none", "capsize": 2, "markersize": 5, **how}
    if upright:
        axes.errorbar(places, values, yerr=lengths, **options)
    else:
        axes.errorbar(values, places, xerr=lengths, **options)


def matrix(axes: Any, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], **how: Any) -> Any:
    """Draw a matrix with its numbers; NaN stays empty. Return the image, for a colour bar.

    Args:
        axes: where.
        values: (R, C).
        rows: their names.
        columns: their names.
        how: ``text``, the format of the numbers, and what imshow takes.
    """
    text = how.pop("text", "{:.2f}")
    image = axes.imshow(np.ma.masked_invalid(values), cmap=SEQUENTIAL, aspect="auto", **how)
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    for row in range(len(rows)):
        for column in range(len(columns)):
            value = values[row, column]
            if np.isfinite(value):
                color = "black" if image.norm(value) > 0.5 else "white"
                axes.text(
                    column,
                    row,
                    text.format(value).replace("-0.00", "0.00"),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=color,
                )
    return image
