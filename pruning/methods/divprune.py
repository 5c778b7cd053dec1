"""DivPrune: the most diverse subset, by greedy max-min distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from pruning.registry import register_pruner
from pruning.selection import ascending, cosine_similarity, farthest_points
from pruning.types import Selection, VisualTokens, check_finite


@register_pruner("divprune", paper="DivPrune, arXiv 2503.02175")
@dataclass(frozen=True)
class DivPrune:
    """Greedy max-min diversity on cosine distance of projected features.

    The first token is the one farthest from its nearest neighbour; every next one is farthest from all picked.

    Differs from the published code: picked tokens are excluded outright, so duplicates and zero vectors still give K
    distinct tokens; every item of a batch is pruned on its own.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K mutually distant positions (B, K)."""
        projected = tokens.features if tokens.projected is None else tokens.projected
        distance = 1 - cosine_similarity(check_finite(projected, "projected features"))  # (B, N, N)
        itself = torch.eye(tokens.count, dtype=torch.bool, device=distance.device)
        apart = distance.masked_fill(itself, float("inf"))
        # A matrix product is not symmetric to the last bit; taking rows and columns keeps mutual neighbours tied.
        lonely = torch.minimum(apart.amin(dim=-1), apart.amin(dim=-2))  # (B, N), distance to the nearest other
        first = lonely.argmax(dim=-1)
        batch = torch.arange(len(first), device=first.device)
        start = distance[batch, first]
        start[batch, first] = float("-inf")
        rest = farthest_points(distance, start, keep - 1)
        return Selection(ascending(torch.cat([first[:, None], rest], dim=1)))
