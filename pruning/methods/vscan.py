"""VScan, its vision part: tokens by window from a shallow layer, tokens of the whole image from a deep one, merging."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunetune.pruning.fitting import Layer
from prunetune.pruning.ops.indexing import ascending, mask_of, rows_of, top_k
from prunetune.pruning.options import check_choice, check_least, check_share
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all

WINDOWS = 4  # per side, as published


@register_pruner(
    "vscan",
    paper="VScan, arXiv 2505.22654 (vision part)",
    merges=True,
    golden=True,
    fits=[Layer("shallow_layer", counts=lambda pruner: pruner.local_ratio > 0)],
)
@dataclass(frozen=True)
class VScan:
    """Keep each window's tokens of highest shallow [CLS] attention and the image's of highest deep; merge the rest.

    Every token that is not kept joins the kept token of highest cosine, in projected features, and a kept token becomes
    the mean of itself and those that joined it. The mean is taken after the projector, so a selection carries its
    weights and gradients reach the projector through all tokens.

    Differs from the published code: what the windows' equal shares leave over goes to the global scan, so K are kept
    (there up to 15 fewer; ``fill: published``); grids of any size are cut into 4 x 4 windows, as even as they allow
    (there 24 x 24 only); budgets below 32 work. The second stage, inside the LLM, is not part of this.

    Attributes:
        local_ratio: share of the budget for the windows, rounded down (published: 0.5).
        shallow_layer: vision layer of the windows' attention, counted from 1 (published: 6 of CLIP-L's 24).
        fill: "global" or "published".
    """

    local_ratio: float = 0.5
    shallow_layer: int = 6
    fill: str = "global"

    def __post_init__(self) -> None:
        """Check the options."""
        check_share("local_ratio", self.local_ratio)
        check_least("shallow_layer", self.shallow_layer, 1)
        check_choice("fill", self.fill, ("global", "published"))

    @property
    def needs(self) -> frozenset[str]:
        """[CLS] attention in the feature layer and in the shallow layer."""
        return frozenset({"cls_attention", f"shallow_attention@{self.shallow_layer}"})

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K), or fewer with ``fill: published``, and how projected tokens are mixed there.

        Raises:
            PruningError: if the tokens form no grid.
        """
        if keep == tokens.count:
            return keep_all(tokens)
        kept = self.kept(tokens, keep)
        weights = mean_weights(tokens.finite("projected"), kept)
        return Selection(kept, origin=list(kept), mixing=list(weights))

    def kept(self, tokens: VisualTokens, keep: int) -> Int[Tensor, "B K"]:
        """Return the kept positions (B, K), ascending."""
        deep = tokens.finite("cls_attention").mean(dim=1)  # (B, N)
        local = self.local(tokens, keep)
        wanted = keep - int(keep * self.local_ratio)
        if self.fill == "global":
            wanted = keep - local.shape[1]
        rest = deep.masked_fill(mask_of(local, tokens.count), float("-inf"))
        return ascending(torch.cat([local, top_k(rest, wanted)], dim=1))

    def local(self, tokens: VisualTokens, keep: int) -> Int[Tensor, "B K_loc"]:
        """Return what the windows keep (B, K_loc), window by window, the most attended of each first."""
        shallow = tokens.finite("shallow_attention").mean(dim=1)  # (B, N)
        window = window_of(*tokens.grid_for("vscan cuts windows of"))
        sizes = torch.bincount(window, minlength=WINDOWS * WINDOWS).tolist()
        quota = int(keep * self.local_ratio) // sum(size > 0 for size in sizes)
        # All tokens window by window, and in a window by attention: a stable sort keeps the order that the first made.
        order = top_k(shallow, tokens.count)
        by_window = window.to(order.device)[order].sort(dim=1, stable=True).indices
        order = order.gather(1, by_window)
        columns: list[int] = []
        start = 0
        for size in sizes:
            columns += range(start, start + min(quota, size))
            start += size
        return order[:, columns]


def window_of(rows: int, columns: int) -> Int[Tensor, " N"]:
    """Return the window (N,) of every patch, numbered row by row; window i begins at ``floor(i * side / 4)``.

    A side of 6 begins its windows at 0, 1, 3 and 4.
    """
    down = torch.tensor(_strips(rows))
    across = torch.tensor(_strips(columns))
    return (down[:, None] * WINDOWS + across).flatten()


def _strips(side: int) -> list[int]:
    """Return the strip of each of ``side`` cells: 6 give ``[0, 1, 1, 2, 3, 3]``."""
    strips: list[int] = []
    for strip in range(WINDOWS):
        strips += [strip] * ((strip + 1) * side // WINDOWS - strip * side // WINDOWS)
    return strips


def mean_weights(
    features: Float[Tensor, "B N D"],
    kept: Int[Tensor, "B K"],
) -> Float[Tensor, "B K N"]:
    """Return the weights (B, K, N) by which each kept token is the mean of itself and the tokens most similar to it."""
    unit = features.double()
    unit = unit / torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp(min=1e-8)
    # Rounded from float64, so that equal tokens tie and the lower index wins.
    similarity = (unit @ rows_of(unit, kept).transpose(1, 2)).float()  # (B, N, K)
    nearest = similarity.argmax(dim=-1)  # (B, N)
    itself = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    nearest = nearest.scatter(1, kept, itself)  # a kept token stays where it is, also beside one that equals it
    member = torch.zeros(len(kept), kept.shape[1], features.shape[1], device=kept.device)
    member.scatter_(1, nearest[:, None], 1.0)
    return member / member.sum(dim=-1, keepdim=True)
