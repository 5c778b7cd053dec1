"""VisPruner: attended tokens, and of the rest those left when duplicates are removed round by round."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prunetune.pruning.ops.duplicates import without_duplicates
from prunetune.pruning.ops.indexing import ascending, rows_of, top_k
from prunetune.pruning.ops.similarity import cosine_similarity
from prunetune.pruning.options import check_choice, check_least, check_share
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens


@register_pruner("vispruner", paper="VisPruner, arXiv 2412.01818v2", golden=True)
@dataclass(frozen=True)
class VisPruner:
    """Keep ``int(K * important_ratio)`` tokens by [CLS] attention and fill up with dissimilar ones (equations 4-6).

    The rest, in order of attention, is split into even and odd entries; the even tokens most similar to any odd one
    are dropped, ``removed_per_round`` at a time, until the budget is met.

    Differs from the published code: an odd remainder puts the extra token on the even side (there it crashes), and a
    round drops at most as many tokens as the even side has.

    Attributes:
        important_ratio: share of the budget taken by attention (published: 0.5).
        removed_per_round: tokens dropped per round (published: 8).
        saliency: "cls" attention, or "received" for towers without [CLS], as the paper does for SigLIP.
    """

    important_ratio: float = 0.5
    removed_per_round: int = 8
    saliency: str = "cls"

    def __post_init__(self) -> None:
        """Check the options."""
        check_share("important_ratio", self.important_ratio)
        check_least("removed_per_round", self.removed_per_round, 1)
        check_choice("saliency", self.saliency, ("cls", "received"))

    @property
    def needs(self) -> frozenset[str]:
        """The attention that ``saliency`` names."""
        return frozenset({f"{self.saliency}_attention"})

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K): the important and the diverse ones."""
        attention = tokens.finite(f"{self.saliency}_attention").mean(dim=1)
        order = top_k(attention, tokens.count)  # (B, N), most attended first
        number = int(keep * self.important_ratio)
        important = order[:, :number]
        if number == keep:
            return Selection(ascending(important))
        # The order of what stays decides every later round. With float32 cosines 3 of 24 random fields of 576 tokens
        # kept the tokens of exact arithmetic, and another batch size could keep others.
        rest = order[:, number:]  # (B, R)
        features = rows_of(tokens.finite("features"), rest)
        similarity = cosine_similarity(features, dtype=torch.float64)  # (B, R, R), in the order of the list
        in_order = torch.arange(rest.shape[1], device=rest.device).expand_as(rest)
        left = without_duplicates(similarity, in_order, keep - number, self.removed_per_round)
        return Selection(ascending(torch.cat([important, rest.gather(1, left)], dim=1)))
