"""PruMerge+: PruMerge with evenly sampled tokens beside the outliers, in three ways to count them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunetune.pruning.methods.prumerge import PruMerge, enriched
from prunetune.pruning.ops.indexing import ascending, first_ranked, mask_of, top_k
from prunetune.pruning.ops.statistics import outlier_share
from prunetune.pruning.options import check_share
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all


@dataclass(frozen=True)
class Attended:
    """Tokens with their attention, as a way of counting sees them.

    Attributes:
        tokens: the items.
        attention: (B, N).
        order: (B, N) all positions, the most attended first.
        keep: K.
        ratio: the method's option.
    """

    tokens: VisualTokens
    attention: Float[Tensor, "B N"]
    order: Int[Tensor, "B N"]
    keep: int
    ratio: float


OutliersAndSamples = tuple[Int[Tensor, " B"], Bool[Tensor, "B N"]]
"""How many outliers each item has, and which tokens are sampled evenly; an outlier may be among them."""


def by_budget(seen: Attended) -> OutliersAndSamples:
    """Make half of the K - 1 tokens outliers, and sample the other half evenly among those that are no outliers."""
    wanted = max(seen.keep - 1, 1)
    outliers = (wanted + 1) // 2
    number = wanted - outliers
    batch, count = seen.order.shape
    others = ascending(seen.order[:, outliers:])  # (B, N - outliers)
    # The middles of `number` equal stretches of the others.
    middle = torch.arange(number, device=seen.order.device) + 0.5
    index = (middle * (count - outliers) / max(number, 1)).long()
    numbers = torch.full((batch,), outliers, device=seen.order.device)
    return numbers, mask_of(others[:, index], count)


def by_outliers(seen: Attended) -> OutliersAndSamples:
    """Take each image's outliers and every ``step / 3``-th index, step being the inverse of their share."""
    count = seen.tokens.count
    index = torch.arange(count, device=seen.order.device)
    share = outlier_share(seen.attention, seen.tokens.image)
    outliers = (share * count).long().clamp(min=1)
    # Rounded down twice, as the published code does: int(1 / ratio), then int(step / 3).
    step = (1 / share.clamp(min=1 / count)).long()
    stride = (step.double() / 3).long().clamp(min=1)
    on_stride = index % stride[:, None] == 0  # (B, N)
    return outliers, on_stride & (index < count - 1)  # the published range ends before the last patch


def by_ratio(seen: Attended) -> OutliersAndSamples:
    """Take the ``ratio`` of highest attention and every ``1 / ratio``-th index, as published for training."""
    count = seen.tokens.count
    index = torch.arange(count, device=seen.order.device)
    number = max(int(count * seen.ratio), 1)
    every = max(int(1 / max(seen.ratio, 1 / count)), 1)
    first = every // 2
    on_stride = (index - first) % every == 0
    sampled = on_stride & (index >= first) & (index < count - 1)  # (N,)
    outliers = torch.full((len(seen.order),), number, device=seen.order.device)
    return outliers, sampled.expand_as(seen.order)


WAYS: dict[str, Callable[[Attended], OutliersAndSamples]] = {
    "budget": by_budget,
    "outliers": by_outliers,
    "ratio": by_ratio,
}


@register_pruner("prumerge_plus", paper="LLaVA-PruMerge+, arXiv 2403.15388", merges=True, golden=True)
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge with evenly sampled tokens beside the outliers.

    With count "outliers", the published default, each image's outliers are joined by every ``step / 3``-th index, step
    being the inverse of their share: about three times as many. With count "ratio", published for training, the
    ``ratio`` of highest attention is joined by every ``1 / ratio``-th index. With count "budget" half of the K - 1
    tokens are outliers and half are sampled evenly from the others.

    Differs from the published code: sampled tokens never repeat outliers (there they do with a fixed ratio, and other
    tokens are dropped for it); the last patch can be sampled only with count "budget"; an image without outliers keeps
    one.

    Attributes:
        count: "budget", "outliers" or "ratio"; the last two leave the budget unused.
        neighbours: how many others a kept token adds.
        ratio: share of tokens by attention with count "ratio" (published: 1 / 8).
    """

    ratio: float = 0.125
    counts: ClassVar[tuple[str, ...]] = tuple(WAYS)

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_share("ratio", self.ratio)

    @property
    def servable(self) -> bool:
        """Whether the number of kept tokens is known before the image is encoded."""
        return self.count == "budget"

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return merged features (K, C) per item: outliers by attention, samples in raster order, the rest token."""
        if self.count == "budget" and keep == tokens.count:
            return keep_all(tokens)
        attention = tokens.finite("reader_attention")  # (B, N)
        order = top_k(attention, tokens.count)
        count = WAYS[self.count]
        outliers, sampled = count(Attended(tokens, attention, order, keep, self.ratio))
        sampled = sampled & ~first_ranked(order, outliers)  # (B, N)
        order = _in_output_order(order, outliers, sampled)
        numbers = outliers + sampled.sum(dim=1)
        return enriched(tokens, attention, order, numbers, self.neighbours, rest=self.has_rest_token(keep))


def _in_output_order(
    order: Int[Tensor, "B N"],
    outliers: Int[Tensor, " B"],
    sampled: Bool[Tensor, "B N"],
) -> Int[Tensor, "B N"]:
    """Return all positions: outliers by attention, then samples in raster order, then the dropped by attention.

    The order ``[[3, 0, 2, 1]]`` with one outlier and the sample 1 gives ``[[3, 1, 0, 2]]``. The published code
    concatenates them so, and the features of golden cases are compared in this order.
    """
    count = order.shape[1]
    rank = torch.arange(count, device=order.device)
    is_outlier = rank < outliers[:, None]  # (B, N), by rank
    is_sample = sampled.gather(1, order)
    tier = torch.where(is_outlier, 0, torch.where(is_sample, 1, 2))
    within = torch.where(tier == 1, order, rank)
    # One sort by (tier, within): no two tokens of a tier have the same `within`, and all are below N.
    return order.gather(1, (tier * count + within).argsort(dim=1))
