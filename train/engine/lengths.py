"""How long samples are once they are pruned, known before any image is opened."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from prunetune.configs import ConfigError
from prunetune.data_recipes import Formatter, RecipeData
from prunetune.data_recipes.lengths import image_sizes, text_lengths
from prunetune.data_recipes.videos import VIDEO
from prunetune.models import Arm
from prunetune.models.features import FeatureFormatter, FeatureStore
from prunetune.pruning import PrunedModel
from prunetune.pruning.elastic import ElasticModel
from prunetune.train.engine.prefix import common_prefix
from prunetune.train.visual import visual_of

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
    visual = arm.pruned.family.token_ids(arm.model)
    return common_prefix(ids, labels, torch.ones_like(ids, dtype=torch.bool), visual)


def lengths_of_settings(
    data: RecipeData, formatter: Formatter | FeatureFormatter, pruned: PrunedModel, max_length: int | None
) -> list[list[int]]:
    """Return :func:`pruned_lengths` for every setting that a run draws from, or for its one setting."""
    if not isinstance(pruned, ElasticModel):
        return [pruned_lengths(data, formatter, pruned, max_length)]
    return [pruned_lengths(data, formatter, part, max_length, cell) for cell, part in enumerate(pruned.parts)]


def pruned_lengths(
    data: RecipeData,
    formatter: Formatter | FeatureFormatter,
    pruned: PrunedModel,
    max_length: int | None,
    cell: int | None = None,
) -> list[int]:
    """Return how many tokens of each sample run through the LLM, or a few more: never fewer, but for two cases.

    Text is counted by the tokenizer, and images by their size, of which the heads of their files are read where it
    matters. The shared prefix counts, since a micro-batch may share nothing. A method that gives images unlike budgets
    is taken at their mean, and what a processor writes between tiles is not seen before an image is opened.

    Args:
        data: the samples.
        formatter: what turns them into batches.
        pruned: whose budget counts.
        max_length: longest sequence before pruning.
        cell: the number of the setting that it is of, for a feature cache; None is the run's own.

    Raises:
        ConfigError: for videos, whose frames are not counted before they are opened.
    """
    if isinstance(formatter, FeatureFormatter):
        texts, kept = text_lengths(data, formatter.formatter), _stored(data, formatter.store, cell)
    else:
        texts, kept = text_lengths(data, formatter), _estimated(data, formatter, pruned)
    if max_length is not None:
        texts = texts.clip(max=max_length)
    return [int(text) + visual for text, visual in zip(texts, kept, strict=True)]


def _stored(data: RecipeData, store: FeatureStore, cell: int | None) -> Iterator[int]:
    """Yield how many tokens of each sample's image stay, as a feature cache knows them."""
    for index in range(len(data)):
        yield store.kept(data[index], cell)


def _estimated(data: RecipeData, formatter: Formatter, pruned: PrunedModel) -> Iterator[int]:
    """Yield how many tokens of each sample's image its size and the budget leave."""
    references = data.rows["image"]
    if any(reference is not None and reference.startswith(VIDEO) for reference in references):
        raise ConfigError("engine.token_budget can't be kept with videos; leave it out, and set train.batch_size")
    model: Any = pruned.model

    @cache
    def kept_of(width: int, height: int) -> int:
        if formatter.square == "pad":
            width = height = max(width, height)
        return visual_of(model, height, width).kept(pruned.spec)

    if not visual_of(model, 336, 336).sized:
        same = kept_of(336, 336)
        yield from (0 if reference is None else same for reference in references)
        return
    for reference, (width, height) in zip(references, image_sizes(data).tolist(), strict=True):
        yield 0 if reference is None else kept_of(width, height)
