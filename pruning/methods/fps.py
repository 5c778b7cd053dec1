"""Farthest point sampling: the plainest method with guaranteed diversity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from prunetune.pruning.ops.greedy import pick_spread
from prunetune.pruning.ops.indexing import ascending
from prunetune.pruning.ops.similarity import euclidean_distance
from prunetune.pruning.options import check_choice
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens


@register_pruner("fps", paper="FPSPruner, appendix C of the adaptive pruning study", exact=False)
@dataclass(frozen=True)
class FPS:
    """Start from one token and add the one farthest, by L2, from everything picked so far.

    A reconstruction: no code was published, and the appendix states neither the starting token nor the feature space.
    Here the start is the token farthest from the mean token, in LLM space as DivPrune's.

    Attributes:
        start: "far" from the mean, "center" nearest to it, or "first" the token of index 0.
        space: "projected" or "features" (before the projector).
    """

    start: str = "far"
    space: str = "projected"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("start", self.start, ("far", "center", "first"))
        check_choice("space", self.space, ("projected", "features"))

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K), far from each other."""
        distance, from_mean = euclidean_distance(tokens.finite(self.space))  # (B, N, N), (B, N)
        items = torch.arange(len(distance), device=distance.device)
        if self.start == "first":
            first = torch.zeros_like(items)
        elif self.start == "far":
            first = from_mean.argmax(dim=-1)
        else:
            first = (-from_mean).argmax(dim=-1)
        # The start is picked here, so that it may be a token the greedy rule would not begin with.
        taken = torch.zeros_like(from_mean, dtype=torch.bool)
        taken[items, first] = True
        rest = pick_spread(distance, distance[items, first], keep - 1, "minimum", taken)
        return Selection(ascending(torch.cat([first[:, None], rest], dim=1)))
