"""How complex images are for one model: effective rank and attention entropy, before and after pruning."""

from __future__ import annotations

import io
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError
from tqdm import tqdm

from prunetune.configs import ConfigError, DataConfig, RecalibrateConfig
from prunetune.configs.load import FOLDER, is_shipped
from prunetune.data_recipes import DataError, Formatter, Sample, load_recipe
from prunetune.data_recipes.images import ImageOpener
from prunetune.models import Arm
from prunetune.outputs import write_text
from prunetune.pruning.ops.complexity import attention_entropy, erank
from prunetune.reading import one_line, read_text

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
    pairs = []
    for modality, chosen in prepared.chosen.items():
        for features in prepared.inputs["mm_encoder_outputs"][modality].pooler_output:
            after["erank"] += erank(features[None]).tolist()
        pairs += list(zip(chosen.candidates, chosen.selections, strict=True))
    # Before: what the pruner chose from, one group for each size of image or frame.
    for among, selection in pairs:
        before["erank"] += erank(among.tokens.finite("projected")).tolist()
        if "cls_attention" not in among.tokens.signals:
            continue
        attention = among.tokens.finite("cls_attention")
        before["attention_entropy"] += attention_entropy(attention).tolist()
        # One item at a time: each keeps other positions, and some methods another number of them.
        for item in range(len(attention)):
            kept = attention[item : item + 1, :, selection.of(item)]
            after["attention_entropy"] += attention_entropy(kept).tolist()


def check_writable(file: Path) -> None:
    """Check, before minutes of measuring, that the means may be written into a configuration.

    Raises:
        ConfigError: for a shipped file, whose next release or reader would not know of it, or another pruner.
    """
    if is_shipped(file):
        name = file.resolve().relative_to(FOLDER.resolve()).with_suffix("").as_posix()
        raise ConfigError(
            f"{file} is shipped, and the averages are written into the file; `prunetune configs copy {name}` makes "
            "one of your own"
        )
    _options(_document(file), file)


def write_averages(file: Path, calibration: Calibration, measured: str) -> dict[str, float]:
    """Write the means into ``pruning.options`` of a YAML file, keeping its comments; return what was written.

    The comment beside a number says where it comes from, so that of a number which is replaced is replaced with it.

    Args:
        file: the configuration.
        calibration: what was measured.
        measured: on what, for the comments.

    Raises:
        ConfigError: if the file is shipped, or its pruner is not `adaptive`.
    """
    check_writable(file)
    document = _document(file)
    options = _options(document, file)
    written = {}
    for name, spread in calibration.before.items():
        option = OPTIONS[name]
        written[option] = options[option] = round(spread.mean, 3)
        # ruamel keeps with a value what follows it up to the next one: the lines below are somebody else's.
        _, newline, below = _comment_after(options, option).partition("\n")
        options.ca.items.pop(option, None)
        options.yaml_add_eol_comment(f"measured by prunetune calibrate, {measured}", option)
        options.ca.items[option][2].value += newline + below
    text = io.StringIO()  # ruamel writes to streams only
    _yaml().dump(document, text)
    # Whole or not at all: the file is somebody's own, with comments that are nowhere else.
    write_text(file, text.getvalue())
    return written


def _yaml() -> YAML:
    yaml = YAML()  # ruamel's, which keeps comments and the order of keys
    yaml.preserve_quotes = True
    yaml.width = 4096  # lines stay as long as they were written
    return yaml


def _document(file: Path) -> Any:
    try:
        return _yaml().load(read_text(file, ConfigError))
    except YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {one_line(error)}") from None


def _options(document: Any, file: Path) -> CommentedMap:
    """Return the section that the means are written into, made if it is not there.

    Raises:
        ConfigError: if the file prunes by another method.
    """
    pruning = document.get("pruning") if isinstance(document, CommentedMap) else None
    pruner = pruning.get("pruner") if isinstance(pruning, CommentedMap) else None
    if not isinstance(pruning, CommentedMap) or pruner != "adaptive":
        raise ConfigError(f"{file} prunes by {pruner!r}; the averages are options of `adaptive`, nothing is written")
    if not isinstance(pruning.get("options"), CommentedMap):
        pruning["options"] = CommentedMap()
    options = pruning["options"]
    for section in (document, pruning, options):
        section.fa.set_block_style()  # on one line in braces there is no room for comments
    return options


def _comment_after(options: CommentedMap, option: str) -> str:
    tokens = options.ca.items.get(option)
    return tokens[2].value if tokens and tokens[2] else ""
