"""How concentrated the tower's attention is, and how much of it each method keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prunetune.evaluation.analysis.figures import COLORS, LINES, drawn, legend_below, named, style
from prunetune.evaluation.analysis.images import Dataset
from prunetune.evaluation.analysis.look import SIGNALS, Looked
from prunetune.evaluation.analysis.pages import Figure, Part, Table, write_table
from prunetune.evaluation.analysis.statistics import gini, mean_of, top_mass

SHARES = np.linspace(0, 1, 101)
"""Of the tokens, at which the curve of the mass is drawn."""
TOPS = (0.01, 0.05, 0.1, 0.25, 0.5)


def mass_curve(shares: np.ndarray) -> np.ndarray:
    """Return what the largest of some shares (N,) add up to, at each of :data:`SHARES` of the tokens (101,)."""
    mass = np.concatenate([[0.0], np.sort(shares)[::-1].cumsum()])
    return np.interp(SHARES * len(shares), np.arange(len(mass)), mass)


class Concentration:
    """Measures the attention of every image.

    Args:
        folder: where rows of images are written to.
        signal: whose mass is counted; None of a tower that offers none.
        labels: of the methods.
    """

    def __init__(self, folder: Path, signal: str | None, labels: Sequence[str]) -> None:
        self.signal = signal
        self.labels = list(labels)
        self._images = None
        if signal is not None:
            columns = ("dataset", "image", "method", "kept_share", "mass", "most", "gini")
            self._images = Table(folder / "concentration_images.csv", columns)
        self._curves: dict[str, list[np.ndarray]] = {}
        self._ginis: dict[str, list[float]] = {}
        self._kept: dict[tuple[str, str], list[tuple[float, float, float]]] = {}

    def add(self, dataset: Dataset, image: str, looked: Looked) -> None:
        """Measure an image; of one in several crops, the mean over them, each with a mass of 1."""
        if self._images is None:
            return
        own_gini = float(np.mean([gini(own) for own in looked.attention]))
        self._ginis.setdefault(dataset.name, []).append(own_gini)
        curve = np.mean([mass_curve(own) for own in looked.attention], axis=0)
        self._curves.setdefault(dataset.name, []).append(curve)
        for label in self.labels:
            rows = []
            for shares, kept in zip(looked.attention, looked.kept[label], strict=True):
                rows.append((kept.mean(), shares[kept].sum(), top_mass(shares, int(kept.sum()))))
            share, mass, most = np.mean(rows, axis=0).tolist()
            self._kept.setdefault((dataset.name, label), []).append((share, mass, most))
            row = {"dataset": dataset.name, "image": image, "method": label, "gini": own_gini}
            self._images.add({**row, "kept_share": share, "mass": mass, "most": most})

    def write(self, folder: Path) -> Part:
        """Write tables and the figure."""
        title = "Concentration of the attention"
        if self._images is None:
            return Part(title, remarks=["The vision tower offers no attention, so there is nothing to measure."])
        self._images.close()
        rows = []
        for name, curves in self._curves.items():
            mean = mean_of(np.array(self._ginis[name]))
            row: dict[str, Any] = {"dataset": name, "n": len(curves), "gini": mean.value}
            row |= {"gini_low": mean.low, "gini_high": mean.high}
            for top in TOPS:
                row[f"top_{top:g}"] = float(np.interp(top, SHARES, np.mean(curves, axis=0)))
            rows.append(row)
        tops = [f"top_{top:g}" for top in TOPS]
        write_table(folder / "concentration.csv", ("dataset", "n", "gini", "gini_low", "gini_high", *tops), rows)
        rows = []
        for (name, label), values in self._kept.items():
            shares, masses, most = np.array(values).T
            mean = mean_of(masses)
            rows.append({"dataset": name, "method": label, "n": len(values), "kept_share": float(shares.mean()),
                         "mass": mean.value, "mass_low": mean.low, "mass_high": mean.high, "most": float(most.mean()),
                         "of_most": float((masses / np.maximum(most, 1e-300)).mean())})  # fmt: skip
        columns = ("dataset", "method", "n", "kept_share", "mass", "mass_low", "mass_high", "most", "of_most")
        write_table(folder / "concentration_kept.csv", columns, rows)
        tables = {
            "concentration.csv": "Gini coefficient, and the mass of the top 1 % to 50 % of the tokens, of each dataset",
            "concentration_kept.csv": "mass that each method keeps, the most that as many tokens can hold, their ratio",
            "concentration_images.csv": "the same of every image",
        }
        return Part(title, [self._draw(folder)], tables)

    def _draw(self, folder: Path) -> Figure:
        count = sum(len(curves) for curves in self._curves.values())
        title = "How much of the attention is kept"
        with drawn(folder, "concentration", title, (4.8, 4.6)) as axes:
            place = axes[0][0]
            for number, (name, curves) in enumerate(self._curves.items()):
                mean = np.mean(self._ginis[name])
                label = f"{name}: largest first (n = {len(curves)}, Gini {mean:.2f})"
                how = {"color": COLORS[6], "linestyle": LINES[number % 4], "linewidth": 1.2}
                place.plot(100 * SHARES, 100 * np.mean(curves, axis=0), label=named(label), **how)
            place.plot([0, 100], [0, 100], color="0.6", linewidth=0.8, label="equal attention")
            for number, label in enumerate(self.labels):
                points = []
                for (_, own), values in self._kept.items():
                    if own == label:
                        points.append(np.mean(values, axis=0)[:2] * 100)
                x, y = np.array(points).T
                # Methods with one budget lie above one another: hollow, so that none hides another.
                how = {**style(number), "linestyle": "none", "markersize": 7, "fillstyle": "none"}
                place.plot(x, y, label=named(label), markeredgewidth=1.6, **how)
            place.set_xlabel("share of the visual tokens (%)")
            place.set_ylabel("share of the attention (%)")
            place.grid(alpha=0.3)
            legend_below(axes)
        assert self.signal is not None
        return Figure(
            "concentration",
            title,
            f"Lines: what the tokens with the largest attention hold together; points: what each method keeps. Means "
            f"over {count} images; feature layer, {SIGNALS[self.signal]}.",
        )
