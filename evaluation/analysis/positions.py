"""Where methods keep tokens: how often each cell of the grid is kept, and how far that is from even."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from prunetune.evaluation.analysis.figures import SEQUENTIAL, drawn
from prunetune.evaluation.analysis.images import Dataset
from prunetune.evaluation.analysis.look import Looked
from prunetune.evaluation.analysis.pages import Figure, Part, write_table

COMMON = (16, 16)
"""The raster of images whose grids differ, as at native resolution."""
DRAWS = 200
"""Blind choices that an even map is compared with."""


def on_raster(values: np.ndarray, raster: tuple[int, int]) -> np.ndarray:
    """Return a grid (R, C) on another raster: each cell takes the one that its middle lies in."""
    rows = ((np.arange(raster[0]) + 0.5) * values.shape[0] / raster[0]).astype(int)
    columns = ((np.arange(raster[1]) + 0.5) * values.shape[1] / raster[1]).astype(int)
    return values[rows[:, None], columns[None, :]]


def unevenness(maps: np.ndarray) -> float:
    """Return the total variation distance of how often cells are kept (R, C) from an even distribution.

    0 if all cells are kept equally often, up to 1: the share of the choices that would have to move.
    """
    total = maps.sum()
    if total == 0:
        return 0.0
    return float(np.abs(maps / total - 1 / maps.size).sum() / 2)


def chance_unevenness(cells: int, kept: Sequence[int], seed: int = 0) -> float:
    """Return the mean :func:`unevenness` of blind choices, of as many cells in as many images.

    Args:
        cells: of the grid.
        kept: how many are kept of each image (n,).
        seed: of the draws.
    """
    random = np.random.default_rng(seed)
    numbers, images = np.unique(np.asarray(kept), return_counts=True)
    found = []
    for _ in range(DRAWS):
        # In how many images a cell is kept is binomial, of each number of tokens for itself. Cells of one image, whose
        # number is fixed, hang together by the little that the total takes out again.
        counts = random.binomial(images[:, None], (numbers / cells)[:, None], size=(len(numbers), cells))
        found.append(unevenness(counts.sum(axis=0)))
    return float(np.mean(found))


@dataclass
class _Kept:
    grids: set[tuple[int, int]] = field(default_factory=set)
    maps: list[np.ndarray] = field(default_factory=list)

    def counts(self, raster: tuple[int, int]) -> np.ndarray:
        """Return in how many images each cell of a raster is kept, or of coarser grids the cell that it lies in."""
        return np.sum([on_raster(own, raster) for own in self.maps], axis=0)


class Positions:
    """Counts where tokens are kept, in the first crop of images that are cut up.

    Args:
        labels: of the methods.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = list(labels)
        self._kept: dict[str, dict[str, _Kept]] = {}
        self._without = 0

    def add(self, dataset: Dataset, image: str, looked: Looked) -> None:
        """Count an image."""
        if looked.grid is None:
            self._without += 1
            return
        by_method = self._kept.setdefault(dataset.name, {label: _Kept() for label in self.labels})
        for label, own in by_method.items():
            own.grids.add(looked.grid)
            # Bytes, not numbers: 10,000 images of 576 cells and 10 methods are 58 MB.
            own.maps.append(looked.kept[label][0].reshape(looked.grid))

    def write(self, folder: Path) -> Part:
        """Write tables and the figure."""
        part = Part("Where tokens are kept")
        if self._without:
            part.remarks.append(f"{self._without} images form no grid and are in no map.")
        if not self._kept:
            return part
        maps, cells, rows = [], [], []
        for dataset, by_method in self._kept.items():
            for label, own in by_method.items():
                raster = next(iter(own.grids)) if len(own.grids) == 1 else COMMON
                counts, images = own.counts(raster), len(own.maps)
                maps.append((dataset, label, counts / images, images))
                cells += _cells(dataset, label, counts, images)
                kept = [int(one.sum() * counts.size / one.size) for one in own.maps]
                border = np.ones(raster, dtype=bool)
                border[1:-1, 1:-1] = False
                rows.append({
                    "dataset": dataset, "method": label, "n": images, "rows": raster[0], "columns": raster[1],
                    "kept_share": float(counts.mean() / images), "unevenness": unevenness(counts),
                    "unevenness_by_chance": chance_unevenness(counts.size, kept),
                    "border": float(counts[border].mean() / max(counts.mean(), 1e-300)),
                    "never": int((counts == 0).sum()),
                })  # fmt: skip
        columns = ("dataset", "method", "n", "rows", "columns", "kept_share", "unevenness", "unevenness_by_chance",
                   "border", "never")  # fmt: skip
        write_table(folder / "positions.csv", columns, rows)
        write_table(folder / "positions_cells.csv", ("dataset", "method", "row", "column", "kept", "of_even"), cells)
        part.tables["positions.csv"] = (
            "total variation distance of each map from an even one, what blind choices of as many tokens have, how "
            "often cells of the border are kept compared with all, and how many cells are never kept"
        )
        part.tables["positions_cells.csv"] = "share of the images in which each cell is kept, and its ratio to the mean"
        part.figures.append(self._draw(folder, maps))
        return part

    def _draw(self, folder: Path, maps: list[tuple[str, str, np.ndarray, int]]) -> Figure:
        datasets = list(self._kept)
        columns = len(self.labels)
        size = (1.75 * columns + 1.1, 1.95 * len(datasets) + 0.4)
        title = "How often each place of the image is kept"
        ratios = [often / max(often.mean(), 1e-300) for _, _, often, _ in maps]
        # The rarest cells do not decide the colours of all others.
        top = max(2.0, float(np.percentile(np.concatenate([own.ravel() for own in ratios]), 98)))
        with drawn(folder, "positions", title, size, rows=len(datasets), columns=columns) as axes:
            image = None
            for number, (dataset, label, often, images) in enumerate(maps):
                place = axes[number // columns][number % columns]
                image = place.imshow(ratios[number], cmap=SEQUENTIAL, vmin=0, vmax=top)
                place.set_xticks([])
                place.set_yticks([])
                place.set_title(f"{label} ({100 * often.mean():.0f} %)")
                if number % columns == 0:
                    place.set_ylabel(f"{dataset} (n = {images})")
            bar = place.figure.colorbar(image, ax=axes, extend="max", shrink=0.9)
            bar.set_label("times as often as the mean cell")
        count = sum(images for _, label, _, images in maps if label == self.labels[0])
        return Figure(
            "positions",
            title,
            f"Means over {count} images, divided by the map's own mean, so that 1 everywhere is an even choice; the "
            "number above is the share of tokens kept. The brightest colour stands for its number and all above.",
        )


def _cells(dataset: str, label: str, counts: np.ndarray, images: int) -> list[dict[str, object]]:
    mean = max(counts.mean(), 1e-300)
    found: list[dict[str, object]] = []
    for (row, column), count in np.ndenumerate(counts):
        found.append({"dataset": dataset, "method": label, "row": row, "column": column,
                      "kept": float(count / images), "of_even": float(count / mean)})  # fmt: skip
    return found
