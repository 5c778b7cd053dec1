"""VisPruner: attended tokens, and of the rest those left when duplicates are removed round by round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruning.registry import register_pruner
from pruning.selection import ascending, cosine_similarity, top_k
from pruning.types import PruningError, Selection, VisualTokens, check_finite


@register_pruner("vispruner", paper="VisPruner, arXiv 2412.01818v2")
@dataclass(frozen=True)
class VisPruner:
    """Keep ``int(K * important_ratio)`` tokens by [CLS] attention and fill up with mutually dissimilar ones.

    The rest, in order of attention, is split into even and odd places; the even tokens most similar to any odd one
    are dropped, ``removed_per_round`` at a time, until the budget is met.

    Differs from the published code: an odd remainder puts the extra token on the even side (there it crashes), and a
    round drops at most as many tokens as the even side has.
    """

    important_ratio: float = 0.5
    removed_per_round: int = 8
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attention"})

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 <= self.important_ratio <= 1:
            raise PruningError(f"important_ratio is a share in [0, 1], got {self.important_ratio}")
        if self.removed_per_round < 1:
            raise PruningError(f"removed_per_round is at least 1, got {self.removed_per_round}")

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K): the important and the diverse ones."""
        saliency = check_finite(tokens.require("cls_attention"), "[CLS] attention").mean(dim=1)
        order = top_k(saliency, tokens.count)  # (B, N), most attended first
        important = int(keep * self.important_ratio)
        rest = order[:, important:]
        rest = self._without_duplicates(tokens, rest, keep - important) if keep > important else rest[:, :0]
        return Selection(ascending(torch.cat([order[:, :important], rest], dim=1)))

    def _without_duplicates(self, tokens: VisualTokens, rest: Tensor, wanted: int) -> Tensor:
        """Shrink ``rest`` (B, R) to ``wanted`` positions; the order of what stays decides the next round's split."""
        similarity = cosine_similarity(check_finite(tokens.features, "vision features"))  # (B, N, N)
        batch = torch.arange(len(rest), device=rest.device)[:, None, None]
        while rest.shape[1] > wanted:
            even, odd = rest[:, 0::2], rest[:, 1::2]
            drop = min(self.removed_per_round, rest.shape[1] - wanted, even.shape[1])
            if odd.shape[1]:
                duplicated = similarity[batch, even[:, :, None], odd[:, None, :]].amax(dim=-1)  # (B, |even|)
            else:
                duplicated = torch.zeros_like(even, dtype=torch.float32)
            by_duplication = torch.sort(duplicated, dim=-1, descending=True, stable=True).indices
            rest = torch.cat([even.gather(1, by_duplication[:, drop:]), odd], dim=1)
        return rest
