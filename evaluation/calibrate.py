"""How complex pictures are for one model: effective rank and attention entropy, before and after pruning."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from ruamel.yaml import YAML
from tqdm import tqdm

from prunetune.configs import ConfigError, RecalibrateConfig
from prunetune.data_recipes import DataError, Formatter, Sample, load_recipe
from prunetune.models import Arm
from prunetune.pruning.ops.complexity import attention_entropy, erank

OPTIONS = {"erank": "erank_avg", "attention_entropy": "entropy_avg"}
"""Which option of the method `adaptive` each measure's mean belongs to."""


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
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
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
        for when, spreads in (("", self.before), (", kept tokens", self.after)):
            for name, s in spreads.items():
                lines.append(f"| {name}{when} | {s.mean:.2f} | {s.lower:.2f} | {s.median:.2f} | {s.upper:.2f} |")
        return "\n".join(lines)


@torch.inference_mode()
def calibrate(config: RecalibrateConfig, count: int, batch_size: int = 8, device: str | None = None) -> Calibration:
    """Measure ``count`` samples of the configuration's data, drawn by its seed, with its model and pruner.

    The effective rank is that of the projected tokens (equations 3 and 7 of the adaptive pruning study), the entropy
    that of the head-averaged [CLS] attention, where the tower has [CLS] (equations 1 and 2).

    Raises:
        DataError, PruningError, CheckpointError: for data, options or weights that can't work.
    """
    data = load_recipe(config.data.recipe, **{**config.data.model_dump(exclude={"recipe"}), "max_samples": None})
    pictured = [index for index, image in enumerate(data.rows["image"]) if image is not None]
    if not pictured:
        raise DataError(f"recipe {data.name!r} has no sample with a picture to calibrate on")
    order = torch.randperm(len(pictured), generator=torch.Generator().manual_seed(config.data.seed or 0))[
        :count
    ].tolist()
    samples = [data[pictured[place]] for place in order]
    arm = Arm.load(config.model, config.pruning, device=device)
    formatter = arm.formatter(data.images)
    before: dict[str, list[float]] = {name: [] for name in OPTIONS}
    after: dict[str, list[float]] = {name: [] for name in OPTIONS}
    for start in tqdm(range(0, len(samples), batch_size), desc="calibrate", unit="batch", dynamic_ncols=True):
        _measure(arm, formatter, samples[start : start + batch_size], before, after)
    return Calibration(
        len(before["erank"]),
        {name: Spread.of(values) for name, values in before.items() if values},
        {name: Spread.of(values) for name, values in after.items() if values},
    )


def _measure(
    arm: Arm, formatter: Formatter, samples: list[Sample], before: dict[str, list[float]], after: dict[str, list[float]]
) -> None:
    prepared = arm.pruned.prepare(arm.place(formatter.prompt_batch(samples)))
    for features in prepared.inputs["mm_encoder_outputs"]["image"].pooler_output:
        after["erank"] += erank(features[None]).tolist()
    chosen = prepared.chosen["image"]
    for among, selection in zip(chosen.candidates, chosen.selections, strict=True):
        before["erank"] += erank(among.tokens.finite("projected")).tolist()
        if "cls_attention" not in among.tokens.signals:
            continue
        attention = among.tokens.finite("cls_attention")
        before["attention_entropy"] += attention_entropy(attention).tolist()
        for item in range(len(attention)):
            kept = attention[item : item + 1, :, selection.of(item)]
            after["attention_entropy"] += attention_entropy(kept).tolist()


def write_averages(file: Path, calibration: Calibration) -> dict[str, float]:
    """Write the means into ``pruning.options`` of a YAML file, keeping its comments; return what was written.

    Raises:
        ConfigError: if the file's pruner is not `adaptive`.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    document = yaml.load(file.read_text())
    pruner = document.get("pruning", {}).get("pruner")
    if pruner != "adaptive":
        raise ConfigError(f"{file} prunes by {pruner!r}; the averages are options of `adaptive`, nothing is written")
    written = {OPTIONS[name]: round(spread.mean, 3) for name, spread in calibration.before.items()}
    document["pruning"].setdefault("options", {}).update(written)
    partial = file.with_name(file.name + ".partial")
    with partial.open("w") as stream:
        yaml.dump(document, stream)
    os.replace(partial, file)
    return written
