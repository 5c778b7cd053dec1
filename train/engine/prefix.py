"""What all prompts begin with, computed once: the keys and values of a frozen LLM do not change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from prunetune.pruning.sequence import IGNORE_INDEX
from prunetune.train.engine.segments import Prefix, Segments, place

SHORTEST = 8
"""Tokens from which on a prefix is worth its keys."""


def common_prefix(
    ids: Int[Tensor, "B L"],
    labels: Int[Tensor, "B L"],
    mask: Bool[Tensor, "B L"],
    visual: Sequence[int],
) -> Int[Tensor, " P"]:
    """Return what all rows begin with, before the first visual token and the first label; it may be nothing.

    The token behind it is no label of any row either, so that no loss is lost with the prefix's own outputs. Rows
    ``[1, 5, 6, 9, 7]`` and ``[1, 5, 6, 8, 9]`` with the placeholder 9 begin with ``[1, 5]``.
    """
    same = (ids == ids[:1]).all(dim=0) & mask.all(dim=0)  # (L,)
    for token in visual:
        same &= (ids != token).all(dim=0)
    same &= (labels == IGNORE_INDEX).all(dim=0)
    length = int(same.long().cumprod(dim=0).sum())
    return ids[0, : max(0, length - 1)]  # the last is left: of it the first own token is predicted, maybe a label


def begins_with(ids: Int[Tensor, "B L"], labels: Int[Tensor, "B L"], prefix: Int[Tensor, " P"]) -> bool:
    """Return whether every row begins with a prefix, goes on behind it, and has no label up to its next token."""
    length = len(prefix)
    if ids.shape[1] <= length:
        return False
    same = (ids[:, :length] == prefix.to(ids.device)).all()
    return bool(same & (labels[:, : length + 1] == IGNORE_INDEX).all())


def prefix_states(language_model: nn.Module, ids: Int[Tensor, " P"]) -> Prefix:
    """Run a language model once on a prefix and return its keys and values; its layers attend by segments."""
    model: Any = language_model
    device = model.device
    place(Segments((len(ids),), None, device))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        cache = model(input_ids=ids.to(device)[None], use_cache=True).past_key_values
    model.train(was_training)
    place(None)
    ran = [layer for layer in cache.layers if layer.keys is not None]  # layers that are left out fill nothing
    keys = [layer.keys[0].detach() for layer in ran]
    values = [layer.values[0].detach() for layer in ran]
    return Prefix(ids.to(device), keys, values)
