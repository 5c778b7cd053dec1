"""DivPrune: the most diverse subset, by greedy max-min distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunetune.pruning.ops.greedy import pick_spread
from prunetune.pruning.ops.indexing import ascending
from prunetune.pruning.ops.similarity import cosine_distance
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens


@register_pruner("divprune", paper="DivPrune, arXiv 2503.02175", golden=True)
@dataclass(frozen=True)
class DivPrune:
    """Greedy max-min diversity on cosine distance of projected features.

    The first token is the one farthest from its nearest neighbour; every next one is farthest from all picked.

    Differs from the published code: picked tokens are excluded outright, so duplicates and zero vectors still give K
    distinct tokens; every item of a batch is pruned on its own; newline tokens of LLaVA-1.6 are no candidates.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K mutually distant positions (B, K)."""
        picks = most_distant(tokens.finite("projected"), keep)
        return Selection(ascending(picks))


def most_distant(
    features: Float[Tensor, "B N D"],
    keep: int,
    among: Bool[Tensor, "B N"] | None = None,
) -> Int[Tensor, "B K"]:
    """Return ``keep`` positions (B, K) of ``features`` (B, N, D) by greedy max-min cosine distance, as picked.

    With ``among`` (B, N), boolean, only those tokens exist.
    """
    distance = cosine_distance(features)  # (B, N, N)
    if among is None:
        taken = torch.zeros(distance.shape[:2], dtype=torch.bool, device=distance.device)
    else:
        taken = ~among
        # Infinitely far: what does not exist is nobody's nearest neighbour. In place, for the matrix is the largest
        # thing there is.
        infinity = float("inf")
        distance.masked_fill_(taken[:, :, None], infinity)
        distance.masked_fill_(taken[:, None, :], infinity)
    first = loneliest(distance, taken)  # (B,)
    items = torch.arange(len(first), device=first.device)
    taken[items, first] = True
    rest = pick_spread(distance, distance[items, first], keep - 1, "minimum", taken)
    return torch.cat([first[:, None], rest], dim=1)


def loneliest(
    distance: Float[Tensor, "B N N"],
    blocked: Bool[Tensor, "B N"],
) -> Int[Tensor, " B"]:
    """Return the token (B,) that is farthest from its nearest neighbour, by distances (B, N, N), not in ``blocked``."""
    # The diagonal is lifted out of the way and put back: a copy of the matrix would cost as much as it takes.
    itself = distance.diagonal(dim1=1, dim2=2)
    own = itself.clone()
    itself.fill_(float("inf"))
    # A matrix product is not symmetric to the last bit; taking rows and columns keeps mutual neighbours tied.
    lonely = torch.minimum(distance.amin(dim=-1), distance.amin(dim=-2))  # (B, N)
    itself.copy_(own)
    return lonely.masked_fill(blocked, float("-inf")).argmax(dim=-1)
