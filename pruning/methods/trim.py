"""TRIM: tokens that CLIP relates to the instruction, and one token with the mean of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from prunetune.pruning.fitting import Choice
from prunetune.pruning.ops.indexing import rows_of, top_k
from prunetune.pruning.ops.rest_token import (
    COUNTS,
    dropped_mask,
    numbers_to_keep,
    strongest_dropped,
    with_rest_token,
)
from prunetune.pruning.options import check_choice
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all


@register_pruner(
    "trim",
    paper="TRIM, arXiv 2409.10994",
    merges=True,
    golden=True,
    fits=[Choice("relevance_sign", values=(-1, 1))],
)
@dataclass(frozen=True)
class Trim:
    """Keep the tokens with the highest softmax of *minus* the CLIP dot product with the text; average the others.

    The minus and the dot product are the published code's (the paper speaks of cosine): its authors saw the opposite
    tokens without it. Kept tokens stay in raster order, the mean of the others comes last.

    Differs from the published code: the extra token counts in the budget; only the instruction is read (in training the
    published code reads the whole conversation, answers included); with K = N nothing changes, with K = 1 there is no
    mean token; with count "outliers" at least one token is kept.

    Attributes:
        count: "budget" keeps K - 1 tokens and the mean; "outliers" is the published adaptive count and leaves the
            budget unused: as many as score above Q3 + 1.5 (Q3 - Q1), over all crops of an image.
        relevance_sign: -1 as published, 1 to prefer tokens similar to the instruction.
    """

    count: str = "budget"
    relevance_sign: int = -1
    needs: ClassVar[frozenset[str]] = frozenset({"image_embeds", "text_embeds"})

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("count", self.count, COUNTS)
        check_choice("relevance_sign", self.relevance_sign, (1, -1))

    @property
    def servable(self) -> bool:
        """Whether the number of kept tokens is known before the image is encoded."""
        return self.count == "budget"

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return merged features (K, C) per item; the mean token sits on the best dropped patch."""
        if self.count == "budget" and keep == tokens.count:
            return keep_all(tokens)
        features = tokens.finite("features")  # (B, N, C)
        text = tokens.finite("text_embeds")[:, 0]  # (B, E), of a long instruction the first 77 CLIP tokens
        similarity = (tokens.finite("image_embeds") @ text[..., None])[..., 0]  # (B, N)
        score = (self.relevance_sign * similarity).softmax(dim=-1)
        numbers = numbers_to_keep(score, tokens, self.count, max(keep - 1, 1))
        order = top_k(score, tokens.count)

        dropped = dropped_mask(order, numbers, score.dtype)
        total = dropped[:, None] @ features  # (B, 1, C)
        mean = total / dropped.sum(dim=1).clamp(min=1)[:, None, None]
        kept = _in_raster_order(order, numbers)
        position = strongest_dropped(order, numbers)
        # A budget of 1 is the one token that is kept: there is no room for the mean.
        rest = mean if self.count == "outliers" or keep > 1 else None
        return with_rest_token(tokens, kept, rows_of(features, kept), numbers, position, rest)


def _in_raster_order(
    order: Int[Tensor, "B N"],
    numbers: Int[Tensor, " B"],
) -> Int[Tensor, "B n"]:
    """Return the first ``numbers`` (B,) of ``order`` in raster order, and behind them what pads a row.

    The order ``[[3, 1, 0], [2, 0, 1]]`` with ``[2, 1]`` gives ``[[1, 3], [2, 0]]``, whose last entry is padding.
    """
    count = order.shape[1]
    kept = order[:, : int(numbers.max())]
    rank = torch.arange(kept.shape[1], device=kept.device)
    # Padding sorts as a position behind the last.
    key = torch.where(rank < numbers[:, None], kept, count)
    return kept.gather(1, key.argsort(dim=1))
