"""PruMerge: outliers of [CLS] attention, enriched with their nearest neighbours, and one rest token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunetune.pruning.ops.indexing import rows_of, top_k
from prunetune.pruning.ops.rest_token import (
    COUNTS,
    dropped_mask,
    numbers_to_keep,
    strongest_dropped,
    with_rest_token,
)
from prunetune.pruning.ops.similarity import cosine_similarity
from prunetune.pruning.options import check_choice, check_least
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all


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

    @property
    def servable(self) -> bool:
        """Whether the number of kept tokens is known before the image is encoded."""
        return self.count == "budget"

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return merged features (K, C) per item; the rest token sits on the strongest dropped patch."""
        if self.count == "budget" and keep == tokens.count:
            return keep_all(tokens)
        attention = tokens.finite("reader_attention")  # (B, N)
        numbers = numbers_to_keep(attention, tokens, self.count, max(keep - 1, 1))
        order = top_k(attention, tokens.count)
        return enriched(tokens, attention, order, numbers, self.neighbours, rest=self.has_rest_token(keep))

    def has_rest_token(self, keep: int) -> bool:
        """Return whether there is room for a rest token: a budget of 1 is the one token that is kept."""
        return self.count != "budget" or keep > 1


def enriched(
    tokens: VisualTokens,
    attention: Float[Tensor, "B N"],
    order: Int[Tensor, "B N"],
    numbers: Int[Tensor, " B"],
    neighbours: int,
    rest: bool,
) -> Selection:
    """Merge neighbours into the first ``numbers`` (B,) tokens of ``order`` (B, N), and what is dropped into one token.

    Args:
        tokens: the items.
        attention: (B, N) what neighbours and dropped tokens are weighted with.
        order: (B, N) all positions in output order, as the published code returns them: golden cases compare it.
        numbers: (B,) how many are kept.
        neighbours: how many others a kept token adds.
        rest: whether the dropped become a token.
    """
    features, keys = tokens.finite("features"), tokens.finite("reader_keys")
    kept = order[:, : int(numbers.max())]  # (B, n), rows with fewer are cut at the end
    similarity = cosine_similarity(rows_of(keys, kept), keys)  # (B, n, N)
    similarity = similarity.scatter(2, kept[..., None], float("-inf"))  # a token is no neighbour of its own
    near = top_k(similarity, min(neighbours, tokens.count - 1))  # (B, n, neighbours)
    # Weights lie in a matrix of mostly zeros: one product with the features, and no atomic additions, whose order on a
    # GPU would change the last bits from run to run.
    near_attention = attention[:, None].expand_as(similarity).gather(2, near)
    weight = torch.zeros_like(similarity).scatter(2, near, near_attention)  # (B, n, N)
    merged = rows_of(features, kept) + weight @ features  # (B, n, C)
    dropped = dropped_mask(order, numbers, attention.dtype)
    summed = (dropped * attention)[:, None] @ features  # (B, 1, C)
    position = strongest_dropped(order, numbers)
    return with_rest_token(tokens, kept, merged, numbers, position, summed if rest else None)
