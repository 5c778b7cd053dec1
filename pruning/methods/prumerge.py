"""PruMerge and PruMerge+: outliers of [CLS] attention, enriched with their nearest neighbours, and one rest token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prunetune.pruning.ops.indexing import ascending, mask_of, rows_of, top_k
from prunetune.pruning.ops.similarity import cosine_similarity
from prunetune.pruning.ops.statistics import outlier_share
from prunetune.pruning.options import check_choice, check_least, check_share
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all

COUNTS = ("budget", "outliers")


@register_pruner("prumerge", paper="LLaVA-PruMerge, arXiv 2403.15388", merges=True, golden=True)
@dataclass(frozen=True)
class PruMerge:
    """Keep the tokens with the highest [CLS] attention in the layer that reads the features.

    Each kept token adds its nearest others by key, weighted by their attention; everything not kept becomes one more
    token, the attention-weighted sum. The output follows attention, the rest token comes last.

    Differs from the published code: the extra token counts in the budget; with K = N nothing changes, with K = 1
    there is no rest token; fewer than 32 others mean fewer neighbours; with count "outliers" at least one token is
    kept.

    Attributes:
        count: "budget" keeps K - 1 tokens and the rest token; "outliers" is the published adaptive count and leaves the
            budget unused: as many as have attention above Q3 + 1.5 (Q3 - Q1), over all crops of an image.
        neighbours: how many others a kept token adds.
    """

    count: str = "budget"
    neighbours: int = 32
    counts: ClassVar[tuple[str, ...]] = COUNTS
    needs: ClassVar[frozenset[str]] = frozenset({"reader_attention", "reader_keys"})

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("count", self.count, self.counts)
        check_least("neighbours", self.neighbours, 1)

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return merged features (K, C) per item; the rest token sits on the strongest dropped patch."""
        if self.count == "budget" and keep == tokens.count:
            return keep_all(tokens)
        attention = tokens.finite("reader_attention")
        numbers = numbers_to_keep(attention, tokens, self.count, max(keep - 1, 1))
        order = top_k(attention, tokens.count)
        rest = self.count == "outliers" or keep > 1
        return enriched(tokens, attention, order, numbers, self.neighbours, rest)


@register_pruner("prumerge_plus", paper="LLaVA-PruMerge+, arXiv 2403.15388", merges=True, golden=True)
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge with evenly sampled tokens beside the outliers.

    With count "outliers", the published default, each image's outliers are joined by every ``step / 3``-th index, step
    being the inverse of their share: about three times as many. With count "ratio", published for training, the
    ``ratio`` of highest attention is joined by every ``1 / ratio``-th index. With count "budget" half of the K - 1
    tokens are outliers and half are sampled evenly from the others.

    Differs from the published code: sampled tokens never repeat outliers (there they do with a fixed ratio, and other
    tokens are lost); the last patch can be sampled only with count "budget"; an image without outliers keeps one.

    Attributes:
        count: "budget", "outliers" or "ratio"; the last two leave the budget unused.
        neighbours: how many others a kept token adds.
        ratio: share of tokens by attention with count "ratio" (published: 1 / 8).
    """

    ratio: float = 0.125
    counts: ClassVar[tuple[str, ...]] = ("budget", "outliers", "ratio")

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_share("ratio", self.ratio)

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return merged features (K, C) per item: outliers by attention, samples in raster order, the rest token."""
        if self.count == "budget" and keep == tokens.count:
            return keep_all(tokens)
        attention = tokens.finite("reader_attention")
        order = top_k(attention, tokens.count)
        place = torch.arange(tokens.count, device=order.device)
        if self.count == "budget":
            wanted = max(keep - 1, 1)
            outliers = numbers_to_keep(attention, tokens, self.count, (wanted + 1) // 2)
            sampled = self._evenly(order, wanted, (wanted + 1) // 2)
        elif self.count == "ratio":
            number, every = max(int(tokens.count * self.ratio), 1), max(int(1 / max(self.ratio, 1 / tokens.count)), 1)
            outliers = torch.full((len(order),), number, device=order.device)
            sampled = (place >= every // 2) & ((place - every // 2) % every == 0) & (place < tokens.count - 1)
        else:
            share = outlier_share(attention, tokens.image)
            outliers = (share * tokens.count).long().clamp(min=1)
            step = (1 / share.clamp(min=1 / tokens.count)).long()  # published: int(1 / ratio)
            stride = (step.double() / 3).long().clamp(min=1)
            sampled = (place % stride[:, None] == 0) & (place < tokens.count - 1)
        first = place.expand_as(order) < outliers[:, None]
        chosen = torch.zeros_like(first).scatter(1, order, first)
        sampled = sampled & ~chosen  # (B, N)
        # Outliers by attention come first, then samples in raster order, then what is dropped, by attention.
        tier = torch.where(first, 0, torch.where(sampled.gather(1, order), 1, 2))
        within = torch.where(tier == 1, order, place)
        order = order.gather(1, (tier * tokens.count + within).argsort(dim=1))
        rest = self.count != "budget" or keep > 1
        return enriched(tokens, attention, order, outliers + sampled.sum(dim=1), self.neighbours, rest)

    def _evenly(self, order: Tensor, wanted: int, outliers: int) -> Tensor:
        """Return a mask (B, N) of ``wanted - outliers`` tokens, evenly spaced among those that are no outliers."""
        count = order.shape[1]
        others = ascending(order[:, outliers:])
        number = wanted - outliers
        places = ((torch.arange(number, device=order.device) + 0.5) * (count - outliers) / max(number, 1)).long()
        return mask_of(others[:, places], count)


def numbers_to_keep(attention: Tensor, tokens: VisualTokens, count: str, budget: int) -> Tensor:
    """Return how many tokens (B,) to keep: ``budget``, or the number of outliers, at least one."""
    if count == "budget":
        return torch.full((len(attention),), budget, device=attention.device)
    return (outlier_share(attention, tokens.image) * tokens.count).long().clamp(min=1)


def enriched(
    tokens: VisualTokens, attention: Tensor, order: Tensor, numbers: Tensor, neighbours: int, rest: bool
) -> Selection:
    """Merge neighbours into the first ``numbers`` (B,) tokens of ``order`` (B, N), and what is left into one token."""
    features, keys = tokens.finite("features"), tokens.finite("reader_keys")
    most = int(numbers.max())
    kept = order[:, :most]  # (B, n), rows with fewer are cut at the end
    similarity = cosine_similarity(rows_of(keys, kept), keys)  # (B, n, N)
    similarity = similarity.scatter(2, kept[..., None], float("-inf"))
    near = top_k(similarity, min(neighbours, tokens.count - 1))
    weight = torch.zeros_like(similarity).scatter(2, near, attention[:, None].expand_as(similarity).gather(2, near))
    merged = rows_of(features, kept) + weight @ features
    place = torch.arange(tokens.count, device=order.device)
    dropped = torch.zeros_like(attention).scatter(1, order, (place >= numbers[:, None]).to(attention))
    spare = (dropped * attention)[:, None] @ features  # (B, 1, C)
    slot = order.gather(1, numbers.clamp(max=tokens.count - 1)[:, None])  # the strongest dropped patch
    return with_rest(tokens, kept, merged, numbers, slot, spare, rest)


def with_rest(
    tokens: VisualTokens, kept: Tensor, merged: Tensor, numbers: Tensor, slot: Tensor, spare: Tensor, rest: bool
) -> Selection:
    """Return the first ``numbers`` (B,) of the tokens as a selection, and behind them the rest token.

    Args:
        tokens: the items.
        kept: (B, n) positions in output order, rows padded to the largest number.
        merged: (B, n, C) their features.
        numbers: how many of them are real.
        slot: (B, 1) where the rest token sits.
        spare: (B, 1, C) the rest token.
        rest: whether there is one; never where all tokens are kept.
    """
    lengths = numbers.tolist()
    merged, spare = merged.to(tokens.features.dtype), spare.to(tokens.features.dtype)
    if len(set(lengths)) == 1:
        extra = int(rest and lengths[0] < tokens.count)
        kept, merged = kept[:, : lengths[0]], merged[:, : lengths[0]]
        positions = torch.cat([kept, slot[:, :extra]], dim=1).sort(dim=1).values
        origin = F.pad(kept, (0, extra), value=-1)
        return Selection(positions, list(torch.cat([merged, spare[:, :extra]], dim=1)), list(origin))
    ragged: list[Tensor] = []
    outputs, origins = [], []
    for item, length in enumerate(lengths):  # ragged outputs are cut one by one; everything before is batched
        extra = int(rest and length < tokens.count)
        ragged.append(torch.cat([kept[item, :length], slot[item, :extra]]).sort().values)
        outputs.append(torch.cat([merged[item, :length], spare[item, :extra]]))
        origins.append(F.pad(kept[item, :length], (0, extra), value=-1))
    return Selection(ragged, outputs, origins)
