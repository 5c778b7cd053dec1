"""GridPrune: first where to look, by zones of the grid, then what to select in each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunetune.pruning.fitting import Choice
from prunetune.pruning.ops.indexing import ascending, top_k
from prunetune.pruning.ops.relevance import instruction_relevance
from prunetune.pruning.options import check_choice, check_least, check_share
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens


@register_pruner(
    "gridprune",
    paper="GridPrune, arXiv 2511.10081",
    exact=False,
    fits=[Choice("relevance_sign", counts=lambda pruner: pruner.alpha > 0, values=(-1, 1))],
)
@dataclass(frozen=True)
class GridPrune:
    """Share the budget among the zones of a regular grid by their relevance and saliency; keep the best of each.

    A token's score is ``alpha`` times its relevance to the instruction plus the rest times its [CLS] attention, each
    min-max scaled. A zone weighs the mean of its scores; seats are shared by the highest-averages rule
    (Sainte-Laguë), which gives exactly K tokens and never more than a zone has.

    A reconstruction: only the idea is known (zonal budgets from text-conditional relevance and visual saliency, then
    selection within zones); the scores, the zones and the rule are ours.

    Attributes:
        zones: zones per side of the grid.
        alpha: weight of the text.
        text: "clip" or "llm", the space in which text and tokens are compared.
        relevance_sign: 1, or -1 as CDPruner's code does in CLIP's space.
    """

    zones: int = 4
    alpha: float = 0.5
    text: str = "clip"
    relevance_sign: int = 1

    def __post_init__(self) -> None:
        """Check the options."""
        check_share("alpha", self.alpha)
        check_choice("relevance_sign", self.relevance_sign, (1, -1))
        check_least("zones", self.zones, 1)
        check_choice("text", self.text, ("clip", "llm"))

    @property
    def needs(self) -> frozenset[str]:
        """[CLS] attention, and the text in the space that ``text`` names."""
        if self.text == "clip":
            return frozenset({"cls_attention", "image_embeds", "text_embeds"})
        return frozenset({"cls_attention", "text_token_embeds"})

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K), the best of every zone.

        Raises:
            PruningError: if the tokens form no grid.
        """
        grid = tokens.grid_for("gridprune cuts zones of")
        relevance = scaled(self.relevance_sign * instruction_relevance(tokens, self.text))
        saliency = scaled(tokens.finite("cls_attention").mean(dim=1))
        score = self.alpha * relevance + (1 - self.alpha) * saliency  # (B, N)
        zone = zone_of(*grid, self.zones).to(score.device)
        same = (zone[:, None] == zone[None, :]).to(score)  # (N, N) whether two tokens share a zone
        weight = (score @ same) / same.sum(dim=0)  # (B, N), mean score of each token's zone
        # A token's seat is its rank within its zone, from 0: how many of its zone precede it by score.
        order = top_k(score, tokens.count)
        by_score = same[order[:, :, None], order[:, None, :]]  # (B, N, N)
        better = by_score.tril(-1).sum(dim=-1)  # (B, N), by score
        seat = torch.empty_like(score).scatter(1, order, better)
        # Every token has its zone's average at its seat, so the K highest averages are the rule's K seats: no loop.
        # Zones of weight 0 come last, fairly: the floor keeps their averages apart.
        averages = weight.clamp(min=1e-6) / (2 * seat + 1)
        return Selection(ascending(top_k(averages, keep)))


def scaled(values: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """Return values (B, N) min-max scaled to [0, 1]; equal values become 0."""
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    return (values - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)


def zone_of(rows: int, columns: int, zones: int) -> Int[Tensor, " N"]:
    """Return the zone (N,) of every patch: ``zones`` strips each way, as even as the grid allows.

    A grid of 2 rows and 3 columns with 2 zones per side gives ``[0, 0, 1, 2, 2, 3]``.
    """
    # A grid with fewer rows than zones has as many strips as rows.
    down = torch.arange(rows) * min(zones, rows) // rows
    across = torch.arange(columns) * min(zones, columns) // columns
    return (down[:, None] * zones + across[None, :]).flatten()
