"""SCOPE: salient tokens that cover what nothing chosen covers yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunetune.pruning.ops.coverage import pick_covering
from prunetune.pruning.ops.indexing import ascending
from prunetune.pruning.ops.similarity import cosine_similarity
from prunetune.pruning.options import check_choice, check_least
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all


@register_pruner("scope", paper="SCOPE, arXiv 2510.24214", golden=True)
@dataclass(frozen=True)
class Scope:
    """Greedy maximum coverage: each pick has the highest coverage gain times its [CLS] attention to ``alpha``.

    A token is covered as much as its cosine to the most similar chosen token, at least 0, in the features before the
    projector; a candidate's gain is the sum of what it would raise. Attention is summed over heads.

    Differs from the published code: where no candidate scores, because everything is covered, the most attended are
    taken (there the lowest indices); cosines are rounded from float64.

    Attributes:
        alpha: power of the attention (published: 1).
        combination: "multiply", or "add" for gain plus attention.
    """

    alpha: float = 1.0
    combination: str = "multiply"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attention"})

    def __post_init__(self) -> None:
        """Check the options."""
        check_least("alpha", self.alpha, 0)
        check_choice("combination", self.combination, ("multiply", "add"))

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K), salient and covering."""
        if keep == tokens.count:
            return keep_all(tokens)
        return Selection(ascending(self.picks(tokens, keep)))

    def picks(self, tokens: VisualTokens, keep: int) -> Int[Tensor, "B K"]:
        """Return the kept positions (B, K) in order of picking."""
        attention = tokens.finite("cls_attention").sum(dim=1)  # (B, N)
        weight = attention.pow(self.alpha)

        def score(gain: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
            return gain * weight if self.combination == "multiply" else gain + weight

        largest = attention.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        fill = attention / largest - 2  # in [-2, -1]
        # Rounded from float64, so that equal tokens have equal cosines.
        similarity = cosine_similarity(tokens.finite("features"), dtype=torch.float64).float()  # (B, N, N)
        return pick_covering(similarity, keep, score, fill)
