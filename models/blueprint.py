"""A model without its weights: everything that its configuration decides can be checked in a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from prunetune.assets import shipped
from prunetune.configs import ModelConfig
from prunetune.data_recipes.chat_templates import MODELS_OWN, check_marks, template_file, template_text
from prunetune.data_recipes.formatting import Formatter
from prunetune.data_recipes.images import ImageOpener
from prunetune.data_recipes.tokens import check_tokens
from prunetune.errors import PrunetuneError
from prunetune.models.loading import CheckpointError, checkpoint_folder, load_processor
from prunetune.models.profile import resolved
from prunetune.models.quantization import check_quantization
from prunetune.pruning import PrunedModel, PruningSpec
from prunetune.pruning.budget import resolve_budget
from prunetune.pruning.families import family_of
from prunetune.pruning.families.base import Family
from prunetune.reading import one_line


def check_model(config: ModelConfig, spec: PruningSpec, others: Sequence[PruningSpec] = ()) -> PreTrainedModel:
    """Check all that can be checked before the weights are read, and return the model on the meta device.

    A hub id is downloaded here if it is not cached.

    Args:
        config: which model.
        spec: how it is pruned.
        others: how else, in a run over several settings.

    Raises:
        CheckpointError: for a folder, file, processor or attention kernel that is missing or broken.
        DataError: for a chat template that is missing or marks no answers, or tokens that can't be given.
        PruningError: for a family that is not known, or that does not offer what the pruner reads.
    """
    model, tokenizer = _without_weights(config)
    for asked in (spec, *others):
        _check_pruning(model, tokenizer, asked)
    return model


def unfit(config: ModelConfig, specs: Sequence[PruningSpec]) -> tuple[Family, list[str | None]]:
    """Return a model's family and, for each of several prunings, why it can't be, or None, see :func:`check_model`.

    Raises:
        CheckpointError, DataError, PruningError: if nothing can be done with the model at all.
    """
    model, tokenizer = _without_weights(config)
    found: list[str | None] = []
    for spec in specs:
        try:
            _check_pruning(model, tokenizer, spec)
            found.append(None)
        except PrunetuneError as error:
            found.append(str(error))
    return family_of(model), found


def _without_weights(config: ModelConfig) -> tuple[PreTrainedModel, Any]:
    """Return a model on the meta device and its tokenizer, after its files were looked at."""
    if config.template != MODELS_OWN:
        template_file(config.template)
    check_quantization(config.quantization)
    folder = checkpoint_folder(config.path, config.revision)
    _check_weight_files(folder)
    try:
        stock = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(stock, attn_implementation=config.attention)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"{config.path!r} can't be loaded as it is configured: {one_line(error)}") from error
    processor = load_processor(config.path, config.revision)
    check_marks(template_text(processor, config.template))
    check_tokens(processor, config.template, config.tokens, folder)  # what only differs is said when weights are loaded
    return model, processor.tokenizer


def _check_pruning(model: PreTrainedModel, tokenizer: Any, spec: PruningSpec) -> None:
    own = resolved(spec)  # that a profile is this model's is checked when its weights are read
    if own.text_tower is not None:
        own = own.model_copy(update={"text_tower": shipped(own.text_tower)})
    _check_budget(PrunedModel(model, own, tokenizer, original=model))


SHAPES = Path(__file__).resolve().parent.parent / "configs" / "shapes"


def model_without_weights(path: str, revision: str | None = None) -> PreTrainedModel:
    """Return a model on the meta device, made of its ``config.json`` alone; no weight file is fetched or opened.

    Of the models that shipped configurations name, the sizes ship as well (``configs/shapes/``): nothing is fetched.

    Args:
        path: folder or hub id.
        revision: of a hub id.

    Raises:
        CheckpointError: if there is no configuration, or it is none of a vision-language model.
    """
    folder = shipped(path)
    own = SHAPES / f"{path.replace('/', '--')}.json"
    source = own if own.is_file() and revision is None and not Path(folder).is_dir() else folder
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise CheckpointError(f"{path} holds no config.json, which says how large the model is; fetch it again")
    try:
        stock = AutoConfig.from_pretrained(source, revision=revision)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(stock)
    # Anything from a wrong id to no network; the user's way out is the same.
    except Exception as error:
        raise CheckpointError(
            f"model {path!r}: no config.json of a vision-language model could be read: {one_line(error)}; give the "
            "folder of a checkpoint, of which the config.json is enough"
        ) from error
    return model


def model_of_random_weights(config: ModelConfig, device: torch.device | str) -> PreTrainedModel:
    """Return a model of a checkpoint's shape whose weights are drawn, in eval mode: for what depends on shapes alone.

    Raises:
        CheckpointError: if there is no configuration, or its attention kernel is not there.
    """
    shape = model_without_weights(config.path, config.revision).config
    dtype = getattr(torch, config.dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(
                shape, dtype=dtype, attn_implementation=config.attention
            )
    except (ValueError, ImportError) as error:
        raise CheckpointError(f"{config.path!r} can't be made as it is configured: {one_line(error)}") from error
    return model.eval()


def pruned_without_tokenizer(model: PreTrainedModel, spec: PruningSpec) -> PrunedModel:
    """Return a pruner on a model of random weights; raises PruningError for a method that reads text or options."""
    return PrunedModel(model, spec, original=model)


def formatter_without_model(config: ModelConfig, images: ImageOpener) -> Formatter:
    """Return what turns samples into batches for a model, of its tokenizer and processor alone.

    Raises:
        CheckpointError: if they are not there; of a hub id no weight file is fetched.
        DataError: for a chat template that is not there, or tokens that can't be given.
    """
    folder = shipped(config.path)
    try:
        if Path(folder).is_dir():
            processor = load_processor(config.path)
        else:
            processor = AutoProcessor.from_pretrained(config.path, revision=config.revision)
    except CheckpointError:
        raise
    # Anything from a wrong id to no network; the user's way out is the same.
    except Exception as error:
        raise CheckpointError(f"the processor of {config.path!r} can't be read: {one_line(error)}") from error
    check_tokens(processor, config.template, config.tokens, Path(folder))
    return Formatter(processor, images, config.template, config.square, tokens=config.tokens)


def _check_budget(pruned: PrunedModel) -> None:
    """Check the budget where every image has as many visual tokens: then the shape of one encoded image says it.

    Raises:
        PruningError: for a budget that none of them has.
    """
    with torch.device("meta"):
        blank = pruned.family.blank(pruned.model)
    if set(blank) != {"pixel_values"} or pruned.spec.small_images == "keep_all":
        return  # of several sizes; the ranks name the image that is too small
    try:
        vision = pruned.family.encode(pruned.model, blank, "image", frozenset())
    except (NotImplementedError, RuntimeError):
        return  # a family from outside may look into tensors, which have no values here
    entering = 0
    for tokens in vision.groups:
        items, count = tokens.features.shape[:2]
        kept = resolve_budget(pruned.spec.keep, count)
        entering += kept if pruned.spec.scope == "image" else items * kept
    if pruned.stages is not None:
        pruned.stages.schedule.counts(entering)  # an average that can't be reached is told with the least


def _check_weight_files(folder: Path) -> None:
    """Read the headers of all weight files: one that was cut off, or is missing, is noticed without reading weights."""
    files = {path.name for path in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    try:
        expected = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else files
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is no index of weight files; fetch the checkpoint again") from None
    if not files or expected - files:
        missing = sorted(expected - files) or ["its .safetensors weights"]
        raise CheckpointError(
            f"{folder} lacks {missing[0]}; fetch the checkpoint again, or convert it with save_pretrained first"
        )
    for name in sorted(files):
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / name} can't be read: {error}; fetch the checkpoint again") from error
