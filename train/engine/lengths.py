"""How long samples are once they are pruned, known before any image is opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from prunetune.configs import ConfigError
from prunetune.data_recipes import Formatter, RecipeData
from prunetune.data_recipes.lengths import text_lengths
from prunetune.models import Arm
from prunetune.models.features import FeatureFormatter, FeatureStore
from prunetune.pruning import PrunedModel
from prunetune.pruning.budget import resolve_budget
from prunetune.train.engine.prefix import common_prefix

LOOKED_AT = 16
"""Samples that are read to learn what all prompts begin with."""


def prompt_prefix(arm: Arm, formatter: Formatter | FeatureFormatter, data: RecipeData) -> Int[Tensor, " P"]:
    """Return what the prompts of a run begin with, (P,) ids, learnt from a few samples spread over the data.

    The same on every rank and after resuming; a micro-batch with a sample that begins otherwise shares nothing.
    """
    number = min(LOOKED_AT, len(data))
    batches = []
    for place in range(number):
        # One by one: a processor may refuse to put unlike samples together.
        batches.append(formatter.training_batch([data[place * len(data) // number]]))
    length = min(batch["input_ids"].shape[1] for batch in batches)
    ids = torch.cat([batch["input_ids"][:, :length] for batch in batches])
    labels = torch.cat([batch["labels"][:, :length] for batch in batches])
    family = arm.pruned.family
    visual = [family.token_id(arm.model, modality) for modality in family.pixels]
    return common_prefix(ids, labels, torch.ones_like(ids, dtype=torch.bool), visual)


def pruned_lengths(
    data: RecipeData, formatter: Formatter | FeatureFormatter, pruned: PrunedModel, max_length: int | None, shared: int
) -> list[int]:
    """Return how many tokens of each sample run through the LLM.

    Text is counted by the tokenizer, placeholders by the processor, and of those the budget keeps its part. A method
    that gives images unlike budgets is taken at their mean, and a video at its longest clip.

    Args:
        data: the samples.
        formatter: what turns them into batches.
        pruned: whose budget counts.
        max_length: longest sequence before pruning.
        shared: tokens of the prefix, which is not run again for every sample.

    Raises:
        ConfigError: if the processor does not say how many placeholders an image gets.
    """
    if isinstance(formatter, FeatureFormatter):
        texts, visual = text_lengths(data, formatter.formatter), _stored(data, formatter.store)
    else:
        texts, visual = text_lengths(data, formatter), _estimated(data, formatter, pruned)
    lengths = []
    for text, (placeholders, kept) in zip(texts.tolist(), visual, strict=True):
        whole = text + placeholders if max_length is None else min(text + placeholders, max_length)
        lengths.append(max(1, whole - placeholders + kept - shared))
    return lengths


def _stored(data: RecipeData, store: FeatureStore) -> Iterator[tuple[int, int]]:
    """Yield each sample's placeholders, and how many of them stay, as a feature cache knows them."""
    for index in range(len(data)):
        sample = data[index]
        yield store.placeholders(sample), store.kept(sample)


def _estimated(data: RecipeData, formatter: Formatter, pruned: PrunedModel) -> Iterator[tuple[int, int]]:
    """Yield each sample's placeholders, and how many of them the budget keeps."""
    counted = Placeholders(formatter)
    for image in data.rows["image"]:
        placeholders = 0 if image is None else counted.of(image)
        yield placeholders, kept_of(pruned, placeholders)


def kept_of(pruned: PrunedModel, placeholders: int) -> int:
    """Return how many of an image's placeholders its budget keeps."""
    if not placeholders:
        return 0
    keep, item = pruned.spec.keep, placeholders
    if pruned.family.item != "image":
        vision: Any = pruned.model.config.vision_config  # type: ignore[union-attr]
        item = min(placeholders, (vision.image_size // vision.patch_size) ** 2)
    own = min(keep, item) if isinstance(keep, int) else resolve_budget(keep, item)
    return -(-own * placeholders // item)


class Placeholders:
    """How many placeholders an image gets, without decoding it where its size does not matter.

    Args:
        formatter: with the processor and the opener.
    """

    def __init__(self, formatter: Formatter) -> None:
        self.formatter = formatter
        self.of_size = cache(self._of_size)
        # Sizes as unlike as they come: a processor that makes equally much of all makes it of any.
        found = {self.of_size(size) for size in ((336, 336), (90, 640), (1200, 300), (777, 1024))}
        self.constant = found.pop() if len(found) == 1 else None

    def of(self, reference: str) -> int:
        """Return the placeholders of an image or video by its reference."""
        if self.constant is not None:
            return self.constant
        size = getattr(self.formatter.images, "size", None)
        if size is not None:
            return self.of_size(size(reference))
        opened = self.formatter.images.open(reference, reference)
        if not isinstance(opened, Image.Image):
            raise ConfigError("engine.token_budget can't be kept with videos; leave it out, and set train.batch_size")
        return self.of_size(opened.size)

    def _of_size(self, size: tuple[int, int]) -> int:
        width, height = size
        if self.formatter.square == "pad":
            width = height = max(size)
        processor: Any = self.formatter.processor
        try:
            tokens = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        except (AttributeError, NotImplementedError):
            raise ConfigError(
                f"engine.token_budget: {type(processor).__name__} does not say how many tokens an image of {width} x "
                f"{height} gets; leave the budget out, and set train.batch_size"
            ) from None
        counts: Sequence[int] = tokens["num_image_tokens"]
        return counts[0]
