"""How complex images are for one model: effective rank and attention entropy, before and after pruning."""

from __future__ import annotations

import io
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from ruamel.yaml import YAML
from tqdm import tqdm

from prunetune.configs import ConfigError, DataConfig, RecalibrateConfig
from prunetune.data_recipes import DataError, Formatter, Sample, load_recipe
from prunetune.data_recipes.images import ImageOpener
from prunetune.models import Arm
from prunetune.outputs import write_text
from prunetune.pruning.ops.complexity import attention_entropy, erank

OPTIONS = {"erank": "erank_avg", "attention_entropy": "entropy_avg"}
"""Which option of the method `adaptive` each measure's mean belongs to."""
Values = dict[str, list[float]]
"""A measure's values, by its name."""


@dataclass(frozen=True)
class Spread:
    """Mean and quartiles of one measure."""

    mean: float
    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Return the spread of some values."""
        if len(values) == 1:  # which statistics.quantiles refuses
            return cls(values[0], values[0], values[0], values[0])
        # The values are all there is, not a sample of something larger, so the extremes are the ends of the range.
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.fmean(values), lower, median, upper)


@dataclass(frozen=True)
class Calibration:
    """Each measure of what the pruner is given (images, crops, or pooled crops) and of what it keeps."""

    items: int
    before: dict[str, Spread]
    after: dict[str, Spread]

    def to_markdown(self) -> str:
        """Return the table."""
        lines = ["| measure | mean | lower quartile | median | upper quartile |", "| --- | ---: | ---: | ---: | ---: |"]
        for name, spread in self.before.items():
            lines.append(_line(name, spread))
        for name, spread in self.after.items():
            lines.append(_line(f"{name}, kept tokens", spread))
        return "\n".join(lines)


def _line(name: str, spread: Spread) -> str:
    numbers = (spread.mean, spread.lower, spread.median, spread.upper)
    return f"| {name} | " + " | ".join(f"{number:.2f}" for number in numbers) + " |"


@torch.inference_mode()
def calibrate(config: RecalibrateConfig, count: int, batch_size: int = 8, device: str | None = None) -> Calibration:
    """Measure ``count`` samples of the configuration's data, drawn by its seed, with its model and pruner.

    The effective rank is that of the projected tokens (equations 3 and 7 of the adaptive pruning study), the entropy
    that of the head-averaged [CLS] attention, where the tower has [CLS] (equations 1 and 2).

    Raises:
        DataError, PruningError, CheckpointError: for data, options or weights that can't work.
    """
    samples, images = _draw(config.data, count)
    arm = Arm.load(config.model, config.pruning, device=device)
    formatter = arm.formatter(images)
    before: Values = {}
    after: Values = {}
    for name in OPTIONS:
        before[name], after[name] = [], []
    for index in tqdm(range(0, len(samples), batch_size), desc="calibrate", unit="batch", dynamic_ncols=True):
        _measure(arm, formatter, samples[index : index + batch_size], before, after)
    return Calibration(len(before["erank"]), _spreads(before), _spreads(after))


def _draw(config: DataConfig, count: int) -> tuple[list[Sample], ImageOpener]:
    """Return ``count`` samples with an image, drawn by the data's seed, and what opens their images.

    Raises:
        DataError: for data that can't be read, or without images.
    """
    options = config.model_dump(exclude={"recipe"})
    options["max_samples"] = None  # what is trained on may be a subset; the averages are those of the whole recipe
    data = load_recipe(config.recipe, **options)
    indices = [index for index, image in enumerate(data.rows["image"]) if image is not None]
    if not indices:
        raise DataError(f"recipe {data.name!r} has no sample with a picture to calibrate on")
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(config.seed or 0))
    samples = [data[indices[position]] for position in order[:count].tolist()]
    return samples, data.images


def _spreads(values: Values) -> dict[str, Spread]:
    """Return the spread of every measure that was taken: towers without [CLS] have no attention entropy."""
    spreads = {}
    for name, measured in values.items():
        if measured:
            spreads[name] = Spread.of(measured)
    return spreads


def _measure(arm: Arm, formatter: Formatter, samples: list[Sample], before: Values, after: Values) -> None:
    """Measure one batch: what the pruner is given, and what it keeps."""
    prepared = arm.pruned.prepare(arm.place(formatter.prompt_batch(samples)))
    # After: the features as they reach the LLM, merged tokens included.
    for features in prepared.inputs["mm_encoder_outputs"]["image"].pooler_output:
        after["erank"] += erank(features[None]).tolist()
    chosen = prepared.chosen["image"]
    # Before: what the pruner chose from, one group for each size of image.
    for among, selection in zip(chosen.candidates, chosen.selections, strict=True):
        before["erank"] += erank(among.tokens.finite("projected")).tolist()
        if "cls_attention" not in among.tokens.signals:
            continue
        attention = among.tokens.finite("cls_attention")
        before["attention_entropy"] += attention_entropy(attention).tolist()
        # One item at a time: each keeps other positions, and some methods another number of them.
        for item in range(len(attention)):
            kept = attention[item : item + 1, :, selection.of(item)]
            after["attention_entropy"] += attention_entropy(kept).tolist()


def write_averages(file: Path, calibration: Calibration) -> dict[str, float]:
    """Write the means into ``pruning.options`` of a YAML file, keeping its comments; return what was written.

    Raises:
        ConfigError: if the file's pruner is not `adaptive`.
    """
    yaml = YAML()  # ruamel's, which keeps comments and the order of keys
    yaml.preserve_quotes = True
    document = yaml.load(file.read_text(encoding="utf-8"))
    pruner = document.get("pruning", {}).get("pruner")
    if pruner != "adaptive":
        raise ConfigError(f"{file} prunes by {pruner!r}; the averages are options of `adaptive`, nothing is written")
    written = {}
    for name, spread in calibration.before.items():
        written[OPTIONS[name]] = round(spread.mean, 3)
    document["pruning"].setdefault("options", {}).update(written)
    text = io.StringIO()  # ruamel writes to streams only
    yaml.dump(document, text)
    # Whole or not at all: the file is somebody's own, with comments that are nowhere else.
    write_text(file, text.getvalue())
    return written
