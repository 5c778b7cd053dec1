"""How complex images are: the effective rank of their tokens and the entropy of the attention, and how the two agree.

The adaptive pruning study takes the effective rank (erank) of the projected tokens (its equations 3 and 7; table 4,
figure 7) and the Shannon entropy in nats of the head-averaged attention of [CLS] in the layer whose output enters the
projector (equations 1 and 2), and correlates them (figure 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prunetune.evaluation.analysis.figures import COLORS, LINES, MARKERS, drawn, legend_below, named, whiskers
from prunetune.evaluation.analysis.images import Dataset
from prunetune.evaluation.analysis.look import SIGNALS, Looked
from prunetune.evaluation.analysis.pages import Figure, Part, Table, write_table
from prunetune.evaluation.analysis.statistics import Estimate, mean_of, pearson, spearman
from prunetune.pruning.ops import erank

MEASURES = {"erank": "effective rank", "entropy": "attention entropy (nats)"}
SPREAD = ("n", "mean", "mean_low", "mean_high", "sd", "min", "q1", "median", "q3", "max")


def entropy(shares: np.ndarray) -> float:
    """Return the Shannon entropy in nats of a distribution (N,)."""
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())


@dataclass
class _Measured:
    """The measures of a dataset's images, in their order; the entropy is NaN where there is no attention."""

    erank: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)

    def of(self, measure: str) -> np.ndarray:
        """Return one measure of all images (n,), without those that have none."""
        values = np.array(getattr(self, measure), dtype=float)
        return values[np.isfinite(values)]


class Complexity:
    """Measures every image.

    Args:
        folder: where rows of images are written to.
        signal: whose entropy is taken; None of a tower that offers none.
    """

    def __init__(self, folder: Path, signal: str | None) -> None:
        self.signal = signal
        self._images = Table(folder / "complexity_images.csv", ("dataset", "image", "sources", "tokens", *MEASURES))
        self._datasets: dict[str, _Measured] = {}
        self._sources: dict[tuple[str, str], _Measured] = {}

    def add(self, dataset: Dataset, image: str, looked: Looked) -> None:
        """Measure an image; of one in several crops, all tokens together, and the mean entropy of the crops."""
        found = {"erank": float(erank(looked.tokens[None])), "entropy": float("nan")}
        if looked.attention:
            found["entropy"] = float(np.mean([entropy(own) for own in looked.attention]))
        sources = dataset.sources[image]
        keys = [(dataset.name, source) for source in sources]
        for own in (
            self._datasets.setdefault(dataset.name, _Measured()),
            *(self._sources.setdefault(key, _Measured()) for key in keys),
        ):
            own.erank.append(found["erank"])
            own.entropy.append(found["entropy"])
        self._images.add(
            {
                "dataset": dataset.name,
                "image": image,
                "sources": ";".join(sources),
                "tokens": len(looked.tokens),
                **found,
            }
        )

    def write(self, folder: Path) -> Part:
        """Write tables and figures."""
        self._images.close()
        there = [name for name in MEASURES if any(len(own.of(name)) for own in self._datasets.values())]
        tables = {"complexity_images.csv": "both measures of every image, with the parts that ask about it"}
        self._write_means(folder, there, tables)
        count = sum(len(own.erank) for own in self._datasets.values())
        part = Part("Complexity of images", tables=tables)
        part.figures.append(self._histograms(folder, there, count))
        part.figures.append(self._means(folder, there, count))
        if "entropy" not in there:
            part.remarks.append("The vision tower offers no attention, so there is no attention entropy.")
            return part
        correlations = self._correlate(folder)
        tables["complexity_correlation.csv"] = "correlation of erank and entropy over images, with intervals"
        part.figures.append(self._scatter(folder, correlations, count))
        return part

    def _write_means(self, folder: Path, there: list[str], tables: dict[str, str]) -> None:
        rows = [row for name, own in self._datasets.items() for row in _spread({"dataset": name}, own, there)]
        write_table(folder / "complexity.csv", ("dataset", "measure", *SPREAD), rows)
        tables["complexity.csv"] = "mean with its 95 % interval, and spread, of each dataset"
        several = len(self._sources) > len(self._datasets)
        if several:
            rows = []
            for (name, source), own in self._sources.items():
                rows += _spread({"dataset": name, "source": source}, own, there)
            write_table(folder / "complexity_sources.csv", ("dataset", "source", "measure", *SPREAD), rows)
            tables["complexity_sources.csv"] = "the same of each part of a benchmark, over the images it asks about"

    def _histograms(self, folder: Path, there: list[str], count: int) -> Figure:
        title = " and ".join(MEASURES[name].partition(" (")[0] for name in there)
        title = f"{title.capitalize()} of {count} images"
        size = (3.6 * len(there), 3.1)
        with drawn(folder, "complexity_histograms", title, size, columns=len(there)) as axes:
            for place, measure in zip(axes[0], there, strict=True):
                values = [own.of(measure) for own in self._datasets.values()]
                edges = np.histogram_bin_edges(np.concatenate(values), bins=20)
                for number, (name, own) in enumerate(zip(self._datasets, values, strict=True)):
                    how: dict[str, Any] = {"color": COLORS[number % 8], "linestyle": LINES[number % 4]}
                    place.hist(
                        own, edges, histtype="step", linewidth=1.6, label=named(f"{name} (n = {len(own)})"), **how
                    )
                    place.axvline(own.mean(), linewidth=0.8, **how)
                place.set_xlabel(MEASURES[measure])
                place.set_ylabel("images")
            legend_below(axes)
        return Figure(
            "complexity_histograms",
            title,
            f"Histograms over {count} images, 20 bins; thin lines are means. {self._how(there)}",
        )

    def _how(self, there: list[str]) -> str:
        text = "Effective rank: exponential of the entropy of the normalised singular values of the projected tokens"
        if "entropy" in there and self.signal is not None:
            text += f"; attention entropy: that of the feature layer's {SIGNALS[self.signal]}"
        return f"{text}."

    def _means(self, folder: Path, there: list[str], count: int) -> Figure:
        rows: list[tuple[str, _Measured, bool]] = []
        for name, own in self._datasets.items():
            rows.append((name, own, True))
            parts = {source: of for (dataset, source), of in self._sources.items() if dataset == name}
            if len(parts) > 1:
                rows += [(f"{name}/{source}", of, False) for source, of in parts.items()]
        height = 1.3 + 0.24 * len(rows)
        title = "Mean complexity of each dataset"
        with drawn(folder, "complexity_means", title, (3.6 * len(there), height), columns=len(there)) as axes:
            for place, measure in zip(axes[0], there, strict=True):
                for number, (_, own, whole) in enumerate(rows):
                    kind = 0 if whole else 1
                    how: dict[str, Any] = {"color": COLORS[(0, 5)[kind]], "marker": MARKERS[kind]}
                    whiskers(place, [number], [mean_of(own.of(measure))], **how)
                labels = [f"{name} (n = {len(own.of(measure))})" for name, own, _ in rows]
                place.set_yticks(range(len(rows)), labels if place is axes[0][0] else [""] * len(rows))
                place.invert_yaxis()
                place.grid(axis="x", alpha=0.3)
                place.set_xlabel(f"mean {MEASURES[measure]}")
        return Figure(
            "complexity_means",
            title,
            f"Means over images with 95 % bootstrap intervals, {count} images in all; squares are parts of a "
            "benchmark, over the images that they ask about. Same measures as above.",
        )

    def _correlate(self, folder: Path) -> dict[str, tuple[int, Estimate | None, Estimate | None]]:
        groups = {name: _pairs(own) for name, own in self._datasets.items()}
        if len(groups) > 1:
            groups["all"] = np.concatenate(list(groups.values()), axis=1)
        found = {}
        rows: list[Mapping[str, Any]] = []
        for name, (ranks, entropies) in groups.items():
            found[name] = (len(ranks), pearson(ranks, entropies), spearman(ranks, entropies))
            row: dict[str, Any] = {"dataset": name, "n": len(ranks)}
            for kind, estimate in zip(("pearson", "spearman"), found[name][1:], strict=True):
                if isinstance(estimate, Estimate):
                    row |= {kind: estimate.value, f"{kind}_low": estimate.low, f"{kind}_high": estimate.high}
            rows.append(row)
        columns = [f"{kind}{end}" for kind in ("pearson", "spearman") for end in ("", "_low", "_high")]
        write_table(folder / "complexity_correlation.csv", ("dataset", "n", *columns), rows)
        return found

    def _scatter(
        self, folder: Path, correlations: Mapping[str, tuple[int, Estimate | None, Estimate | None]], count: int
    ) -> Figure:
        title = "Attention entropy and effective rank"
        with drawn(folder, "complexity_correlation", title, (4.6, 4.0)) as axes:
            place = axes[0][0]
            for number, (name, own) in enumerate(self._datasets.items()):
                ranks, entropies = _pairs(own)
                pearsons = correlations[name][1]
                label = f"{name} (n = {len(ranks)}" + (f", r = {pearsons.value:.2f})" if pearsons else ")")
                how = {"marker": MARKERS[number % 8], "color": COLORS[number % 8], "alpha": 0.6}
                place.scatter(entropies, ranks, s=14, linewidths=0, label=named(label), **how)
            place.set_xlabel(MEASURES["entropy"])
            place.set_ylabel(MEASURES["erank"])
            place.grid(alpha=0.3)
            legend_below(axes, 1)
        told = []
        for name, (_, *both) in correlations.items():
            words = [f"{kind} {_told(own)}" for kind, own in zip(("Pearson", "Spearman"), both, strict=True)]
            told.append(f"{name}: {', '.join(words)}")
        return Figure(
            "complexity_correlation",
            title,
            f"A point an image, {count} in all; correlations with 95 % intervals of 10,000 resamples of the images: "
            f"{'; '.join(told)}.",
        )


def _pairs(own: _Measured) -> np.ndarray:
    """Return erank and entropy (2, n) of the images that have both."""
    both = np.array([own.erank, own.entropy], dtype=float)
    return both[:, np.isfinite(both).all(axis=0)]


def _told(estimate: Estimate | None) -> str:
    if estimate is None:
        return "not defined (fewer than three images, or all alike)"
    ends = "" if estimate.low is None else f" [{estimate.low:.2f}, {estimate.high:.2f}]"
    return f"{estimate.value:.2f}{ends}"


def _spread(name: Mapping[str, str], own: _Measured, there: list[str]) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for measure in there:
        values = own.of(measure)
        if not len(values):
            continue
        mean = mean_of(values)
        least, first, middle, third, most = np.percentile(values, [0, 25, 50, 75, 100]).tolist()
        rows.append({**name, "measure": measure, "n": len(values), "mean": mean.value, "mean_low": mean.low,
                     "mean_high": mean.high, "sd": float(values.std()), "min": least, "q1": first, "median": middle,
                     "q3": third, "max": most})  # fmt: skip
    return rows
