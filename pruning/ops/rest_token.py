"""Tokens that stay, and one more that stands for all that were dropped: what PruMerge and TRIM return."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from prunetune.pruning.ops.statistics import outlier_share
from prunetune.pruning.types import Selection, VisualTokens

COUNTS = ("budget", "outliers")


def numbers_to_keep(
    scores: Float[Tensor, "B N"],
    tokens: VisualTokens,
    count: str,
    budget: int,
) -> Int[Tensor, " B"]:
    """Return how many tokens (B,) to keep: ``budget``, or the number of outliers, at least one."""
    if count == "budget":
        return torch.full((len(scores),), budget, device=scores.device)
    share = outlier_share(scores, tokens.image)
    return (share * tokens.count).long().clamp(min=1)


def dropped_mask(
    order: Int[Tensor, "B N"],
    numbers: Int[Tensor, " B"],
    dtype: torch.dtype,
) -> Float[Tensor, "B N"]:
    """Return 1 for every token (B, N) behind the first ``numbers`` (B,) of ``order`` (B, N), and 0 for the others.

    The order ``[[2, 0, 1]]`` with the number ``[1]`` gives ``[[1.0, 1.0, 0.0]]``.
    """
    rank = torch.arange(order.shape[1], device=order.device)
    dropped = (rank >= numbers[:, None]).to(dtype)  # (B, N), by rank
    return torch.zeros(order.shape, dtype=dtype, device=order.device).scatter(1, order, dropped)


def strongest_dropped(
    order: Int[Tensor, "B N"],
    numbers: Int[Tensor, " B"],
) -> Int[Tensor, "B 1"]:
    """Return the position (B, 1) that follows the first ``numbers`` (B,) of ``order`` (B, N): the rest token's.

    The order ``[[2, 0, 1]]`` with the number ``[1]`` gives ``[[0]]``. Where nothing is dropped it is the last.
    """
    last = order.shape[1] - 1
    return order.gather(1, numbers.clamp(max=last)[:, None])


def with_rest_token(
    tokens: VisualTokens,
    kept: Int[Tensor, "B n"],
    features: Float[Tensor, "B n C"],
    numbers: Int[Tensor, " B"],
    position: Int[Tensor, "B 1"],
    rest: Float[Tensor, "B 1 C"] | None,
) -> Selection:
    """Return the first ``numbers`` (B,) of the tokens as a selection, and behind them the rest token.

    Kept ``[[4, 1]]`` with the rest token at ``[[3]]`` are the positions ``[[1, 3, 4]]``; the outputs are in the order
    of their origins ``[4, 1, -1]``.

    Args:
        tokens: the items.
        kept: (B, n) positions in output order, rows padded to the largest number.
        features: (B, n, C) their features.
        numbers: how many of them are real.
        position: (B, 1) where the rest token sits.
        rest: (B, 1, C) the rest token; None for none. An item of which all tokens are kept has none either.
    """
    lengths = numbers.tolist()
    dtype = tokens.features.dtype
    features = features.to(dtype)
    rest = features[:, :0] if rest is None else rest.to(dtype)
    if len(set(lengths)) == 1:
        length = lengths[0]
        extra = rest.shape[1] if length < tokens.count else 0
        kept = kept[:, :length]
        positions = torch.cat([kept, position[:, :extra]], dim=1)
        outputs = torch.cat([features[:, :length], rest[:, :extra]], dim=1)
        origin = F.pad(kept, (0, extra), value=-1)
        return Selection(positions.sort(dim=1).values, list(outputs), list(origin))
    ragged: list[Tensor] = []
    merged, origins = [], []
    # Ragged outputs are cut one by one; everything before is batched.
    for item, length in enumerate(lengths):
        extra = rest.shape[1] if length < tokens.count else 0
        own = kept[item, :length]
        positions = torch.cat([own, position[item, :extra]])
        outputs = torch.cat([features[item, :length], rest[item, :extra]])
        ragged.append(positions.sort().values)
        merged.append(outputs)
        origins.append(F.pad(own, (0, extra), value=-1))
    return Selection(ragged, merged, origins)
