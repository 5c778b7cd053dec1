"""Tokens handed on in an order of the method's own, and zero vectors in between: what some published codes return."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from prunetune.pruning.ops.indexing import ascending
from prunetune.pruning.types import Selection


def copies(
    order: Int[Tensor, "B K"],
    count: int,
    in_order: bool,
    real: Bool[Tensor, "B K"] | None = None,
) -> Selection:
    """Return copies of the projected tokens ``order`` (B, K) of ``count``, zero vectors where ``real`` (B, K) is False.

    The order ``[[3, 0]]`` of 4 tokens, ``in_order``, puts token 3 into the slot of token 0 and token 0 into the slot of
    token 3, so that the LLM reads 3 first.

    Args:
        order: distinct positions; those of zero vectors are the slots they take up.
        count: N.
        in_order: whether the LLM gets them in this order; else each in its own slot.
        real: which are copies; None for all.
    """
    mixing = F.one_hot(order, count).float()  # (B, K, N)
    origin = order
    if real is not None:
        mixing = mixing * real[..., None]
        origin = order.masked_fill(~real, -1)
    return Selection(ascending(order), origin=list(origin), mixing=list(mixing), in_order=in_order)
