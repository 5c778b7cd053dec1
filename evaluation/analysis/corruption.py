"""What corrupted images change: answers, kept tokens and effective rank, for the fifteen corruptions of ImageNet-C.

The adaptive pruning study's table 17 is the change of the effective rank, over MME's images at severities 1 and 3.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from prunetune.configs import CorruptionConfig
from prunetune.data_recipes.images import ImageOpener
from prunetune.evaluation.analysis.figures import COLORS, MARKERS, drawn, legend_below, matrix, named, style, whiskers
from prunetune.evaluation.analysis.images import Dataset
from prunetune.evaluation.analysis.look import Batch, Eye, Looked
from prunetune.evaluation.analysis.pages import Figure, Part, write_table
from prunetune.evaluation.analysis.statistics import Estimate, chance_jaccard, corrected, jaccard, mean_of
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.tasks import Item
from prunetune.models import Arm
from prunetune.names import nearest
from prunetune.pruning.ops import erank

DENSE = "dense"
CLEAN = "clean"
NAMES = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
IMPULSES = (0.03, 0.06, 0.09, 0.17, 0.27)
"""Share of the values that impulse noise replaces, by severity: ImageNet-C's."""
SMALLEST = 32
"""Pixels of a side, below which the library corrupts nothing."""


def library() -> Any:
    """Return the library of the corruptions.

    Raises:
        TaskError: if it is not installed.
    """
    try:
        return importlib.import_module("imagecorruptions")
    except ImportError as error:
        raise TaskError(
            f"the corruptions can't be made ({error}); pip install 'prunetune[analysis]', or leave corruption out of "
            "analyses"
        ) from None


def check_names(names: Sequence[str] | None) -> tuple[str, ...]:
    """Return which corruptions are made; raises TaskError for a name that is none."""
    for name in names or ():
        if name not in NAMES:
            raise TaskError(f"unknown corruption {name!r}{nearest(name, NAMES)}; there are {', '.join(NAMES)}")
    return tuple(dict.fromkeys(names)) if names else NAMES


def corrupt(image: Image.Image, name: str, severity: int, seed: int) -> Image.Image:
    """Return a corrupted image, the same one for the same seed.

    Args:
        image: at least 32 pixels wide and high.
        name: one of :data:`NAMES`.
        severity: 1 to 5.
        seed: of what is drawn.

    Raises:
        TaskError: for a smaller image, or without the library.
    """
    if min(image.size) < SMALLEST:
        raise TaskError(
            f"an image of {image.size[0]} x {image.size[1]} pixels can't be corrupted, both sides need at least "
            f"{SMALLEST}; leave it out"
        )
    pixels = np.asarray(image.convert("RGB"))
    made = library()
    if name == "impulse_noise":
        # The library asks scikit-image for it without a seed.
        noise = importlib.import_module("skimage.util").random_noise
        noisy = noise(pixels / 255.0, mode="s&p", rng=seed, amount=IMPULSES[severity - 1])
        return Image.fromarray((np.clip(noisy, 0, 1) * 255).astype(np.uint8))
    options = {"seed": seed} if name == "glass_blur" else {}  # its loop is compiled, and has a generator of its own
    # Everything else it draws from NumPy's global generator, which is put back as it was.
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        return Image.fromarray(made.corrupt(pixels, severity=severity, corruption_name=name, **options))
    finally:
        np.random.set_state(before)


def seed_of(reference: str, name: str, severity: int, seed: int) -> int:
    """Return the seed of one corrupted image: no two images have the same noise."""
    text = f"{seed}/{name}/{severity}/{reference}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@dataclass(frozen=True)
class CorruptedImages:
    """Opens images and corrupts them."""

    images: ImageOpener
    name: str
    severity: int
    seed: int

    def exists(self, reference: str) -> bool:
        """Return whether the image is there."""
        return self.images.exists(reference)

    def open(self, reference: str, sample_id: str) -> Image.Image:
        """Return the corrupted image."""
        image = self.images.open(reference, sample_id)
        seed = seed_of(reference, self.name, self.severity, self.seed)
        try:
            return corrupt(image, self.name, self.severity, seed)
        except TaskError as error:
            raise TaskError(f"image {reference!r}: {error}") from None


@dataclass
class Outcome:
    """What came of the images of a dataset under one corruption; lists have one entry for each image.

    Attributes:
        eranks: effective rank of all tokens.
        scores: by arm; None where an item has no score.
        overlaps: by method, Jaccard index with what is kept of the clean image, and that of blind choices.
    """

    eranks: list[float] = field(default_factory=list)
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    overlaps: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


class Corruption:
    """Asks every arm about corrupted images, encoded once for all arms.

    Args:
        eye: looks at images.
        config: which corruptions, and of how many questions.
        batch_size: images that are encoded together.
    """

    def __init__(self, eye: Eye, config: CorruptionConfig, batch_size: int) -> None:
        self.eye = eye
        self.config = config
        self.names = check_names(config.names)
        self.batch_size = batch_size
        self.arms: dict[str, Arm] = {DENSE: eye.arm, **eye.arms}
        self._outcomes: dict[tuple[str, str, int], Outcome] = {}
        self._images: dict[str, int] = {}

    @property
    def conditions(self) -> list[tuple[str, int]]:
        """Clean images, and every corruption at every severity."""
        return [(CLEAN, 0), *((name, severity) for name in self.names for severity in self.config.severities)]

    def steps(self, datasets: Sequence[Dataset]) -> int:
        """Return how many images are encoded in all."""
        return len(self.conditions) * sum(min(len(own.items), self.config.questions) for own in datasets)

    def run(self, dataset: Dataset, ran: Callable[[int], object]) -> None:
        """Ask about a dataset's images under all conditions.

        Args:
            dataset: its first images are taken.
            ran: called with how many images were asked about.
        """
        items = dataset.items[: self.config.questions]
        self._images[dataset.name] = len(items)
        clean: list[Looked] = []
        for name, severity in self.conditions:
            images = dataset.images
            if name != CLEAN:
                images = CorruptedImages(images, name, severity, self.config.seed)
            outcome = self._outcomes[dataset.name, name, severity] = Outcome()
            for start in range(0, len(items), self.batch_size):
                part = items[start : start + self.batch_size]
                batch = self.eye.batch(images, dataset.samples(part))
                looked = batch.looked()
                if name == CLEAN:
                    clean += [own.choices() for own in looked]
                self._ask(outcome, dataset, part, batch)
                _compare(outcome, looked, clean[start : start + len(part)])
                ran(len(part))

    def _ask(self, outcome: Outcome, dataset: Dataset, items: Sequence[Item], batch: Batch) -> None:
        """Let every arm answer, where the benchmark scores answers one by one."""
        if dataset.task is None or dataset.task.scorer is None:
            return
        for label, arm in self.arms.items():
            with torch.inference_mode():
                generated = arm.pruned.generate(
                    **batch.inputs_of(arm),
                    vision=batch.vision,
                    max_new_tokens=self.config.max_new_tokens,
                    do_sample=False,
                )
            texts: list[str] = arm.processor.batch_decode(generated.tokens, skip_special_tokens=True)
            scores = [dataset.task.score(text.strip(), item).score for text, item in zip(texts, items, strict=True)]
            outcome.scores.setdefault(label, []).extend(scores)

    def write(self, folder: Path) -> Part:
        """Write tables and figures."""
        part = Part("Corrupted images")
        rows = list(self._rows())
        columns = ("dataset", "corruption", "severity", "method", "n", *_columns("accuracy", "change", "jaccard"),
                   "jaccard_by_chance", "jaccard_corrected")  # fmt: skip
        write_table(folder / "corruption.csv", columns, rows)
        part.tables["corruption.csv"] = (
            "accuracy in percent of each arm, its paired change from clean images in points, and the overlap of kept "
            "tokens with the clean image's, with 95 % intervals"
        )
        columns = (
            "dataset",
            "corruption",
            "severity",
            "n",
            "clean",
            *_columns("difference"),
            "of_clean_mean",
            "relative",
        )
        write_table(folder / "corruption_erank.csv", columns, self._eranks())
        part.tables["corruption_erank.csv"] = (
            "mean absolute change of the effective rank, its share of the clean mean, and the mean of each image's"
        )
        self._draw(folder, part)
        return part

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        for (dataset, name, severity), outcome in self._outcomes.items():
            clean = self._outcomes[dataset, CLEAN, 0]
            for label in self.arms:
                row: dict[str, Any] = {"dataset": dataset, "corruption": name, "severity": severity, "method": label}
                row["n"] = len(outcome.eranks)
                scores, before = _numbers(outcome, label), _numbers(clean, label)
                if scores is not None and before is not None:
                    row |= _cells("accuracy", mean_of(100 * scores))
                    if name != CLEAN:
                        row |= _cells("change", mean_of(100 * (scores - before)))
                if label in outcome.overlaps and name != CLEAN:
                    overlap, chance = np.array(outcome.overlaps[label]).T
                    row |= _cells("jaccard", mean_of(overlap))
                    row["jaccard_by_chance"] = float(chance.mean())
                    row["jaccard_corrected"] = corrected(float(overlap.mean()), float(chance.mean()))
                yield row

    def _eranks(self) -> Iterator[Mapping[str, Any]]:
        for (dataset, name, severity), outcome in self._outcomes.items():
            if name == CLEAN:
                continue
            clean = np.array(self._outcomes[dataset, CLEAN, 0].eranks)
            difference = np.abs(np.array(outcome.eranks) - clean)
            mean = mean_of(difference)
            yield {"dataset": dataset, "corruption": name, "severity": severity, "n": len(clean),
                   "clean": float(clean.mean()), **_cells("difference", mean),
                   "of_clean_mean": mean.value / float(clean.mean()),
                   "relative": float((difference / clean).mean())}  # fmt: skip

    def _draw(self, folder: Path, part: Part) -> None:
        count = sum(self._images.values())
        told = f"{count} images, severities {', '.join(map(str, self.config.severities))}"
        if any(own.scores for own in self._outcomes.values()):
            part.figures.append(self._draw_matrix(folder, "accuracy", told))
        part.figures.append(self._draw_matrix(folder, "overlap", told))
        part.figures.append(self._draw_severities(folder, told))
        part.figures.append(self._draw_eranks(folder, told))

    def _pooled(self, what: str, label: str, names: Sequence[str], severities: Sequence[int]) -> np.ndarray | None:
        """Return a measure of all images under some conditions, by image: the mean over the conditions (n,)."""
        found = []
        for dataset in self._images:
            values = []
            for name in names:
                for severity in severities:
                    outcome = self._outcomes[dataset, name, severity]
                    own = _numbers(outcome, label) if what == "accuracy" else _overlaps(outcome, label)
                    if own is not None:
                        values.append(own)
            if values:
                found.append(np.mean(values, axis=0))
        return np.concatenate(found) if found else None

    def _draw_matrix(self, folder: Path, what: str, told: str) -> Figure:
        labels = list(self.arms) if what == "accuracy" else list(self.eye.arms)
        rows = [CLEAN, *self.names] if what == "accuracy" else list(self.names)
        values = np.full((len(rows), len(labels)), np.nan)
        for row, name in enumerate(rows):
            severities = [0] if name == CLEAN else self.config.severities
            for column, label in enumerate(labels):
                own = self._pooled(what, label, [name], severities)
                if own is not None:
                    values[row, column] = own.mean()
        high = 1.0 if what == "overlap" else 100.0
        title = "Kept tokens" if what == "overlap" else "Accuracy"
        title = f"{title} under corruption, {sum(self._images.values())} images"
        with drawn(folder, f"corruption_{what}", title, (2.6 + 0.55 * len(labels), 1.2 + 0.22 * len(rows))) as axes:
            text = "{:.2f}" if what == "overlap" else "{:.0f}"
            names = [name.replace("_", " ") for name in rows]
            scaled = values if what == "overlap" else 100 * values
            image = matrix(axes[0][0], scaled, names, labels, vmin=0, vmax=high, text=text)
            bar = axes[0][0].figure.colorbar(image, ax=axes)
            bar.set_label("Jaccard index with the clean image's" if what == "overlap" else "accuracy (%)")
        if what == "overlap":
            sentence = "How far the tokens kept of a corrupted image are those kept of the clean one"
            return Figure("corruption_overlap", title, f"{sentence}: mean over {told}.")
        sentence = "Accuracy in percent of dense and pruned arms"
        return Figure("corruption_accuracy", title, f"{sentence}: mean over {told}.")

    def _draw_severities(self, folder: Path, told: str) -> Figure:
        whats = {"accuracy": "accuracy (%)", "overlap": "Jaccard index with the clean image's"}
        if not any(own.scores for own in self._outcomes.values()):
            del whats["accuracy"]
        title = f"Severity of corruption, {sum(self._images.values())} images"
        with drawn(folder, "corruption_severity", title, (3.6 * len(whats), 3.3), columns=len(whats)) as axes:
            for place, (what, name) in zip(axes[0], whats.items(), strict=True):
                for number, label in enumerate(self.arms):
                    places, estimates = [], []
                    for severity in (0, *self.config.severities) if what == "accuracy" else self.config.severities:
                        own = self._pooled(what, label, self.names if severity else [CLEAN], [severity])
                        if own is not None:
                            places.append(severity + 0.05 * (number - len(self.arms) / 2))
                            estimates.append(mean_of(own * (100 if what == "accuracy" else 1)))
                    if estimates:
                        whiskers(place, places, estimates, upright=True, label=named(label), **style(number))
                place.set_xlabel("severity (0 is the clean image)" if what == "accuracy" else "severity")
                place.set_ylabel(name)
                place.set_xticks([0, *self.config.severities] if what == "accuracy" else self.config.severities)
                place.grid(alpha=0.3)
            legend_below(axes, 5)
        return Figure(
            "corruption_severity",
            title,
            f"Means over {len(self.names)} corruptions of {told}, with 95 % bootstrap intervals over images.",
        )

    def _draw_eranks(self, folder: Path, told: str) -> Figure:
        title = f"Effective rank under corruption, {sum(self._images.values())} images"
        with drawn(folder, "corruption_erank", title, (4.6, 1.7 + 0.24 * len(self.names))) as axes:
            place = axes[0][0]
            for number, severity in enumerate(self.config.severities):
                estimates = []
                for name in self.names:
                    own = [self._changes(dataset, name, severity) for dataset in self._images]
                    estimates.append(mean_of(np.concatenate(own)))
                shift = 0.6 * (number - (len(self.config.severities) - 1) / 2) / len(self.config.severities)
                at = [row + shift for row in range(len(self.names))]
                how: dict[str, Any] = {"color": COLORS[number % 8], "marker": MARKERS[number % 8], "markersize": 4}
                whiskers(place, at, estimates, label=f"severity {severity}", **how)
            place.set_yticks(range(len(self.names)), [name.replace("_", " ") for name in self.names])
            place.invert_yaxis()
            place.set_xlabel("mean absolute change of the effective rank")
            place.grid(axis="x", alpha=0.3)
            legend_below(axes, 5)
        clean = np.concatenate([self._outcomes[dataset, CLEAN, 0].eranks for dataset in self._images])
        return Figure(
            "corruption_erank",
            title,
            f"Mean absolute difference to the clean image's, over {told}, with 95 % bootstrap intervals; clean images "
            f"have {clean.mean():.1f} in the mean, with a standard deviation of {clean.std():.1f}.",
        )

    def _changes(self, dataset: str, name: str, severity: int) -> np.ndarray:
        clean = np.array(self._outcomes[dataset, CLEAN, 0].eranks)
        return np.abs(np.array(self._outcomes[dataset, name, severity].eranks) - clean)


def _compare(outcome: Outcome, looked: Sequence[Looked], clean: Sequence[Looked]) -> None:
    """Compare what is kept of corrupted images with what is kept of the clean ones."""
    for own, before in zip(looked, clean, strict=True):
        outcome.eranks.append(float(erank(own.tokens[None])))
        for label in own.kept:
            one, other = own.kept_of_all(label), before.kept_of_all(label)
            chance = chance_jaccard(own.count, int(one.sum()), int(other.sum()))
            outcome.overlaps.setdefault(label, []).append((jaccard(one, other), chance))


def _numbers(outcome: Outcome, label: str) -> np.ndarray | None:
    """Return an arm's scores (n,); None where some item has none."""
    scores = outcome.scores.get(label)
    if not scores or None in scores:
        return None
    return np.array(scores, dtype=float)


def _overlaps(outcome: Outcome, label: str) -> np.ndarray | None:
    """Return a method's Jaccard indices (n,)."""
    values = outcome.overlaps.get(label)
    return None if values is None else np.array(values)[:, 0]


def _columns(*names: str) -> list[str]:
    return [f"{name}{end}" for name in names for end in ("", "_low", "_high")]


def _cells(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
