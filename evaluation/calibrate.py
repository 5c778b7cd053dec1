"""How complex pictures are for one model: effective rank and attention entropy, before and after pruning."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from ruamel.yaml import YAML
from tqdm import tqdm

from configs import ConfigError, RecalibrateConfig
from data_recipes import DataError, Formatter, Sample, load_recipe
from pruning import PrunedModel, Pruner, PruningSpec, Selection, VisualTokens
from pruning.checkpoint import load_model
from pruning.complexity import attention_entropy, erank
from pruning.text import instruction_text

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
    model, processor = load_model(**config.model.model_dump(include={"path", "revision", "dtype", "attention"}))
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pruned = PrunedModel(model, PruningSpec(**config.pruning.model_dump()), processor.tokenizer)
    seen = Recorder(pruned.pruner)
    pruned.pruner = seen
    formatter = Formatter(
        processor, data.images, config.model.template, config.model.square, instructions=instruction_text
    )
    before: dict[str, list[float]] = {name: [] for name in OPTIONS}
    after: dict[str, list[float]] = {name: [] for name in OPTIONS}
    for start in tqdm(range(0, len(samples), batch_size), desc="calibrate", unit="batch", dynamic_ncols=True):
        _measure(pruned, seen, formatter, samples[start : start + batch_size], before, after)
    return Calibration(
        len(before["erank"]),
        {name: Spread.of(values) for name, values in before.items() if values},
        {name: Spread.of(values) for name, values in after.items() if values},
    )


class Recorder:
    """A pruner that keeps what it was given and what it answered: crops, or with scope "image" their pools."""

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner
        self.calls: list[tuple[VisualTokens, Selection]] = []

    @property
    def needs(self) -> frozenset[str]:
        """The signals of the pruner itself."""
        return self.pruner.needs

    @property
    def general_prompts(self) -> Sequence[str]:
        """The prompts of the pruner itself."""
        return getattr(self.pruner, "general_prompts", ())

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Prune and record."""
        selection = self.pruner(tokens, keep)
        self.calls.append((tokens, selection))
        return selection


def _measure(
    pruned: PrunedModel,
    seen: Recorder,
    formatter: Formatter,
    samples: list[Sample],
    before: dict[str, list[float]],
    after: dict[str, list[float]],
) -> None:
    inputs = formatter.prompt_batch(samples)
    instructions = inputs.pop("instructions")
    inputs = {name: value.to(pruned.model.device) for name, value in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(pruned.model.dtype)
    prepared = pruned.prepare({**inputs, "instructions": instructions})
    for features in prepared.inputs["mm_encoder_outputs"]["image"].pooler_output:
        after["erank"] += erank(features[None]).tolist()
    for tokens, selection in seen.calls:
        before["erank"] += erank(tokens.finite("projected")).tolist()
        if tokens.cls_attention is not None:
            attention = tokens.finite("cls_attention")
            before["attention_entropy"] += attention_entropy(attention).tolist()
            for item in range(len(attention)):
                after["attention_entropy"] += attention_entropy(
                    attention[item : item + 1, :, selection.of(item)]
                ).tolist()
    seen.calls.clear()


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
