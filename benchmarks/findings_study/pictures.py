"""The three pictures of docs/findings.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from findings_study.intervals import Estimate
from findings_study.plan import AT_16, EIGHT, GRID, OBJECTIVES, soup, tuned_on_dense, tuned_on_random
from findings_study.results import BySeed, Results, brief, full, special, special_long, trained, untrained
from findings_study.world import DENSE, Cell

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(results: Results, folder: Path) -> list[str]:
    """Write every picture whose rows are there, and return their names."""
    drawn = []
    for name, picture in (("elastic", grid_picture), ("transfer", transfer_picture), ("objectives", objective_picture)):
        figure = picture(results)
        if figure is not None:
            path = folder / f"findings_{name}.png"
            figure.savefig(path, dpi=110)
            pyplot.close(figure)
            drawn.append(path.name)
    return drawn


def grid_picture(results: Results) -> Any | None:
    """Return accuracy by cell: without training, of specialists, and of one elastic projector."""
    series: list[tuple[str, str, str, Callable[[Cell], BySeed]]] = [
        ("no training", "x", "0.45", lambda cell: untrained),
        ("16 specialists, 125 updates each", "o", "tab:blue", special),
        ("16 specialists, 1,000 updates each", "d", "tab:green", special_long),
        ("one elastic projector, 1,000 updates", "*", "tab:orange", lambda cell: full()),
    ]
    figure, axes = pyplot.subplots(figsize=(8.4, 5.2))
    drawn = 0
    for number, (label, mark, color, made) in enumerate(series):
        for place, cell in enumerate((*GRID, DENSE)):
            if cell == DENSE and number in (1, 2):
                continue  # no specialist's own setting
            found = results.accuracy(made(cell), cell)
            if found is None:
                continue
            drawn += number == 3
            x = place + place // 4 * 0.8 + 0.14 * (number - 1.5)
            size = 9 if mark == "*" else 5
            bars = _lengths(found)
            axes.errorbar(x, found.value, yerr=bars, fmt=mark, color=color, markersize=size, linewidth=1, label=label)
            label = "_"
    if not drawn:
        pyplot.close(figure)
        return None
    places = [place + place // 4 * 0.8 for place in range(17)]
    axes.set_xticks(places, [*(f"{cell.keep}" for cell in GRID), "all"])
    for number, name in enumerate([cell.pruner for cell in AT_16]):
        axes.text(places[4 * number] + 1.5, 31, f"{name}", ha="center", fontsize=9)
    axes.text(places[16], 31, "dense", ha="center", fontsize=9)
    axes.set_ylim(29, 102)
    axes.set_xlabel("visual tokens kept of 144")
    axes.set_ylabel("accuracy on 2,400 test questions, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 0.06))
    figure.tight_layout()
    return figure


def transfer_rows() -> list[tuple[str, BySeed]]:
    """Return whose accuracy everywhere is shown, by the name of its row."""
    rows: list[tuple[str, BySeed]] = [("nothing (no training)", untrained)]
    for cell in AT_16:
        rows.append((str(cell), special(cell)))
    rows.append(("mean of these four weights", soup))
    rows.append(("dense pictures", trained(tuned_on_dense)))
    rows.append(("fresh random positions", trained(tuned_on_random)))
    rows.append(("every cell and dense (elastic)", full()))
    return rows


def transfer_picture(results: Results) -> Any | None:
    """Return what was tuned for what, and what it scores where; the colour is the gain over no training."""
    columns = (*GRID, DENSE)
    rows = []
    for name, made in transfer_rows():
        values = [results.accuracy(made, cell) for cell in columns]
        if any(value is not None for value in values):
            rows.append((name, [np.nan if value is None else value.value for value in values]))
    if len(rows) < 2:
        return None
    table = np.array([values for _, values in rows])
    gain = table - table[0]
    figure, axes = pyplot.subplots(figsize=(11, 0.42 * len(rows) + 1.8))
    most = 20.0  # points; a few cells are beyond, and would make all others pale
    axes.imshow(gain, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    for row, column in np.argwhere(~np.isnan(table)):
        dark = abs(gain[row, column]) > 0.6 * most
        axes.text(column, row, f"{table[row, column]:.1f}", ha="center", va="center", fontsize=8,
                  color="white" if dark else "black")  # fmt: skip
    axes.set_xticks(range(len(columns)), [str(cell) for cell in columns], fontsize=8, rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.set_ylabel("tuned for")
    axes.set_xlabel("evaluated with (numbers: accuracy, %; colour: points above no training)", fontsize=9)
    figure.tight_layout()
    return figure


def objective_picture(results: Results) -> Any | None:
    """Return what each objective does for pruned pictures and for whole ones."""
    found = []
    for name, changes in OBJECTIVES.items():
        made = brief(**changes)
        pruned, dense = results.above(made, untrained, EIGHT), results.above(made, untrained, DENSE)
        if pruned is not None and dense is not None:
            found.append((name, pruned, dense))
    if not found:
        return None
    found.sort(key=lambda row: row[1].value)
    figure, both = pyplot.subplots(1, 2, figsize=(9, 0.34 * len(found) + 1.3), sharey=True)
    for axes, column, title in zip(both, (1, 2), ("pruned: mean of 8 cells", "all visual tokens"), strict=True):
        for place, row in enumerate(found):
            estimate = row[column]
            assert isinstance(estimate, Estimate)
            axes.errorbar(estimate.value, place, xerr=_lengths(estimate), fmt="o", color="tab:blue", capsize=2)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_xlabel(f"points above no training, {title}", fontsize=9)
        axes.grid(alpha=0.3)
    both[0].set_yticks(range(len(found)), [row[0] for row in found], fontsize=9)
    figure.tight_layout()
    return figure


def _lengths(estimate: Estimate) -> np.ndarray:
    """Return how far the interval reaches down and up, as matplotlib takes it."""
    return np.array([[max(estimate.value - estimate.low, 0)], [max(estimate.high - estimate.value, 0)]])
