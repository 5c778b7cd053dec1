"""How diverse the kept tokens are among themselves: their effective rank, and their mean pairwise cosine distance.

The adaptive pruning study's table 1 is the first of the two, over POPE's images at 64 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prunetune.evaluation.analysis.figures import drawn, legend_below, named, style, whiskers
from prunetune.evaluation.analysis.images import Dataset
from prunetune.evaluation.analysis.look import Looked
from prunetune.evaluation.analysis.pages import Figure, Part, Table, write_table
from prunetune.evaluation.analysis.statistics import Estimate, mean_of
from prunetune.pruning.ops import erank

MEASURES = {"erank": "effective rank of the kept tokens", "distance": "mean pairwise cosine distance"}


def cosine_distance(tokens: Tensor) -> float:
    """Return the mean cosine distance of all pairs of tokens (K, D); NaN of fewer than two.

    The cosines of all pairs add up to the squared length of the sum of the unit vectors, less K of them with
    themselves: no K x K matrix is made. A vector of zeros is at distance 1 from every other.
    """
    count = len(tokens)
    if count < 2:
        return float("nan")
    units = torch.nn.functional.normalize(tokens.double(), dim=-1)
    own = float((units**2).sum())  # fewer than K where a vector is zero
    pairs = float((units.sum(dim=0) ** 2).sum()) - own
    return 1 - pairs / (count * (count - 1))


class Diversity:
    """Measures what is kept of every image.

    Args:
        folder: where rows of images are written to.
        labels: of the methods.
    """

    def __init__(self, folder: Path, labels: Sequence[str]) -> None:
        self.labels = list(labels)
        self._images = Table(folder / "diversity_images.csv", ("dataset", "image", "method", "kept", *MEASURES))
        self._values: dict[str, dict[str, list[tuple[float, float, float]]]] = {}

    def add(self, dataset: Dataset, image: str, looked: Looked) -> None:
        """Measure what the LLM is given of an image, merged tokens included; and all of its tokens, as "dense"."""
        by_method = self._values.setdefault(dataset.name, {label: [] for label in ("dense", *self.labels)})
        for label, features in {"dense": looked.tokens, **looked.features}.items():
            found = (len(features), float(erank(features[None])) if len(features) else float("nan"),
                     cosine_distance(features))  # fmt: skip
            by_method[label].append(found)
            row = dict(zip(("kept", *MEASURES), found, strict=True))
            self._images.add({"dataset": dataset.name, "image": image, "method": label, **row})

    def write(self, folder: Path) -> Part:
        """Write tables and the figure."""
        self._images.close()
        found: dict[tuple[str, str, str], Estimate] = {}
        rows = []
        for dataset, by_method in self._values.items():
            for label, values in by_method.items():
                columns = np.array(values, dtype=float).T
                row = {"dataset": dataset, "method": label, "n": len(values), "kept": float(columns[0].mean())}
                for name, own in zip(MEASURES, columns[1:], strict=True):
                    finite = own[np.isfinite(own)]
                    if len(finite):
                        mean = found[dataset, label, name] = mean_of(finite)
                        row |= {name: mean.value, f"{name}_low": mean.low, f"{name}_high": mean.high}
                rows.append(row)
        ends = [f"{name}{end}" for name in MEASURES for end in ("", "_low", "_high")]
        write_table(folder / "diversity.csv", ("dataset", "method", "n", "kept", *ends), rows)
        tables = {
            "diversity.csv": "means over images with 95 % intervals; dense keeps everything",
            "diversity_images.csv": "the same of every image",
        }
        return Part("Diversity of the kept tokens", [self._draw(folder, found)], tables)

    def _draw(self, folder: Path, found: dict[tuple[str, str, str], Estimate]) -> Figure:
        datasets = list(self._values)
        count = sum(len(of["dense"]) for of in self._values.values())
        title = "Diversity of the kept tokens"
        height = 1.8 + 0.3 * len(self.labels)
        with drawn(folder, "diversity", title, (7.4, height), columns=2) as axes:
            for place, (measure, name) in zip(axes[0], MEASURES.items(), strict=True):
                for number, dataset in enumerate(datasets):
                    shift = 0.5 * (number - (len(datasets) - 1) / 2) / max(len(datasets), 1)
                    at = [row for row, label in enumerate(self.labels) if (dataset, label, measure) in found]
                    own = [found[dataset, self.labels[row], measure] for row in at]
                    how = {**style(number), "linestyle": "none"}
                    label = f"{dataset} (n = {len(self._values[dataset]['dense'])})"
                    whiskers(place, [row + shift for row in at], own, label=named(label), **how)
                place.set_yticks(
                    range(len(self.labels)), self.labels if measure == "erank" else [""] * len(self.labels)
                )
                place.set_ylim(len(self.labels) - 0.4, -0.6)
                place.grid(axis="x", alpha=0.3)
                place.set_xlabel(name)
            legend_below(axes)
        dense = [f"{name} {found[name, 'dense', 'erank'].value:.1f}" for name in datasets]
        return Figure(
            "diversity",
            title,
            f"Of the features that reach the LLM, means over {count} images with 95 % bootstrap intervals. Left: "
            "effective rank; right: one minus the mean cosine of all pairs. The effective rank of all tokens is "
            f"{', '.join(dense)}.",
        )
