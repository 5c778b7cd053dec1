"""HiPrune: anchors that a middle layer attends to, their neighbours, and what a deep layer attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from prunetune.pruning.fitting import Layer
from prunetune.pruning.ops.indexing import ascending, mask_of, top_k
from prunetune.pruning.options import check_least, check_share
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens


@register_pruner(
    "hiprune",
    paper="HiPrune, arXiv 2508.00553",
    golden=True,
    fits=[Layer("object_layer", counts=lambda pruner: pruner.alpha > 0)],
)
@dataclass(frozen=True)
class HiPrune:
    """Keep anchors with their grid neighbours, and the tokens that receive most attention in the feature layer.

    Anchors are the ``round(K * alpha / 5)`` tokens with most attention received in the object layer; each brings four
    neighbours, and the tokens with most attention received in the feature layer (registers) fill the budget.

    Neighbours are index -1, +1, -columns and +columns, clamped to the grid as published: those of a row's first patch
    include the last of the row above.

    Differs from the published code: the budget counts per item and is not split over a batch; anchors and neighbours
    that exceed the budget are cut, anchors first, then neighbours by attention in the feature layer (there it crashes);
    the grid's width is read from the model.

    Attributes:
        alpha: share of the budget that anchors and neighbours may take (published: 0.1).
        object_layer: vision layer of the anchors, counted from 1 (published: 9 of CLIP-L's 24).
    """

    alpha: float = 0.1
    object_layer: int = 9

    def __post_init__(self) -> None:
        """Check the options."""
        check_share("alpha", self.alpha)
        check_least("object_layer", self.object_layer, 1)

    @property
    def needs(self) -> frozenset[str]:
        """Attention received in the feature layer and in the object layer."""
        return frozenset({"received_attention", f"object_attention@{self.object_layer}"})

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K): anchors, their neighbours, and registers.

        Raises:
            PruningError: if the tokens form no grid.
        """
        _, columns = tokens.grid_for("hiprune keeps neighbours on")
        deep = tokens.finite("received_attention").mean(dim=1)  # (B, N)
        middle = tokens.finite("object_attention").mean(dim=1)  # (B, N)
        anchors = top_k(middle, round(keep * self.alpha / 5))  # a fifth: each anchor brings four neighbours
        anchored = mask_of(anchors, tokens.count)
        beside = neighbours(anchors, columns, tokens.count)
        around = mask_of(beside, tokens.count) & ~anchored
        # Attention is at most 1: anchors rank above neighbours, neighbours above the rest.
        rank = deep + around.float() + 2 * anchored.float()
        return Selection(ascending(top_k(rank, keep)))


def neighbours(
    positions: Int[Tensor, "B K"],
    columns: int,
    count: int,
) -> Int[Tensor, "B 4*K"]:
    """Return the four neighbours (B, 4 K) of positions (B, K) in raster order, clamped to 0 .. count - 1.

    Of a grid with 3 columns and 9 patches, ``[[4]]`` gives ``[[3, 5, 1, 7]]``.
    """
    steps = torch.tensor([-1, 1, -columns, columns], device=positions.device)
    beside = positions[:, :, None] + steps  # (B, K, 4)
    return beside.clamp(0, count - 1).flatten(1)
