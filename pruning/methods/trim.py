"""TRIM: tokens that CLIP relates to the instruction, and one token with the mean of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from prunetune.pruning.methods.prumerge import COUNTS, numbers_to_keep, with_rest
from prunetune.pruning.ops.indexing import rows_of, top_k
from prunetune.pruning.options import check_choice
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all


@register_pruner("trim", paper="TRIM, arXiv 2409.10994", merges=True, golden=True)
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

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return merged features (K, C) per item; the mean token sits on the best dropped patch."""
        if self.count == "budget" and keep == tokens.count:
            return keep_all(tokens)
        features = tokens.finite("features")
        text = tokens.finite("text_embeds")[:, 0]  # of a long instruction, the first 77 CLIP tokens
        similarity = (tokens.finite("image_embeds") @ text[..., None])[..., 0]
        score = (self.relevance_sign * similarity).softmax(dim=-1)  # (B, N)
        numbers = numbers_to_keep(score, tokens, self.count, max(keep - 1, 1))
        order = top_k(score, tokens.count)
        place = torch.arange(tokens.count, device=order.device)
        dropped = torch.zeros_like(score).scatter(1, order, (place >= numbers[:, None]).to(score))
        mean = (dropped[:, None] @ features) / dropped.sum(dim=1).clamp(min=1)[:, None, None]  # (B, 1, C)
        slot = order.gather(1, numbers.clamp(max=tokens.count - 1)[:, None])
        kept = order[:, : int(numbers.max())]
        # Kept tokens go in raster order; what pads a row goes behind them.
        real = torch.arange(kept.shape[1], device=kept.device) < numbers[:, None]
        kept = kept.gather(1, torch.where(real, kept, tokens.count).argsort(dim=1))
        rest = self.count == "outliers" or keep > 1
        return with_rest(tokens, kept, rows_of(features, kept), numbers, slot, mean, rest)
