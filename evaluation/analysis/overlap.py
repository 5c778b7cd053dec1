"""How far methods keep the same tokens of an image: Jaccard index, and that less what blind choices share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from prunetune.evaluation.analysis.figures import drawn, matrix
from prunetune.evaluation.analysis.images import Dataset
from prunetune.evaluation.analysis.look import Looked
from prunetune.evaluation.analysis.pages import Figure, Part, write_table
from prunetune.evaluation.analysis.statistics import chance_jaccard, corrected, jaccard, mean_of


class Overlap:
    """Compares what methods keep, image by image.

    Args:
        labels: of the methods.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = list(labels)
        self._values: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
        self._images = 0

    def add(self, dataset: Dataset, image: str, looked: Looked) -> None:
        """Compare all pairs of methods on an image."""
        self._images += 1
        kept = {label: looked.kept_of_all(label) for label in self.labels}
        for one, other in combinations(self.labels, 2):
            chance = chance_jaccard(looked.count, int(kept[one].sum()), int(kept[other].sum()))
            own = self._values.setdefault((dataset.name, one, other), [])
            own.append((jaccard(kept[one], kept[other]), chance))

    def write(self, folder: Path) -> Part:
        """Write the table and the figure."""
        title = "Overlap between methods"
        if len(self.labels) < 2:
            return Part(title, remarks=["One method alone has nothing to be compared with."])
        rows = []
        for (dataset, one, other), values in self._values.items():
            overlap, chance = np.array(values).T
            mean = mean_of(overlap)
            row: dict[str, Any] = {"dataset": dataset, "method": one, "other": other, "n": len(values)}
            row |= {"jaccard": mean.value, "low": mean.low, "high": mean.high, "by_chance": float(chance.mean())}
            rows.append({**row, "corrected": corrected(float(overlap.mean()), float(chance.mean()))})
        columns = ("dataset", "method", "other", "n", "jaccard", "low", "high", "by_chance", "corrected")
        write_table(folder / "overlap.csv", columns, rows)
        tables = {
            "overlap.csv": "mean Jaccard index with its 95 % interval, that of blind choices, and corrected for it"
        }
        return Part(title, [self._draw(folder)], tables)

    def _draw(self, folder: Path) -> Figure:
        number = len(self.labels)
        plain, above = np.full((number, number), np.nan), np.full((number, number), np.nan)
        for first, second in combinations(range(number), 2):
            pair = (self.labels[first], self.labels[second])
            values = np.concatenate([np.array(own) for key, own in self._values.items() if key[1:] == pair])
            overlap, chance = values.mean(axis=0)
            plain[first, second] = plain[second, first] = overlap
            scaled = corrected(float(overlap), float(chance))
            above[first, second] = above[second, first] = np.nan if scaled is None else scaled
        side = 1.3 + 0.42 * number
        title = f"How far methods keep the same tokens of {self._images} images"
        with drawn(folder, "overlap", title, (2 * side + 1.2, side + 0.6), columns=2) as axes:
            for place, values, name in zip(axes[0], (plain, above), ("Jaccard index", "above chance"), strict=True):
                names = self.labels if place is axes[0][0] else [""] * number
                image = matrix(place, values, names, self.labels, vmin=0, vmax=1)
                place.set_title(name)
            place.figure.colorbar(image, ax=axes, shrink=0.9)
        return Figure(
            "overlap",
            title,
            f"Mean over {self._images} images. Left: tokens that both keep, as a share of those that either keeps; "
            "right: the same on a scale where blind choices of as many tokens have 0 and equal choices 1.",
        )
