"""The four variants of adaptive pruning, each a function of the tokens and of what their complexity allows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunetune.pruning.methods.bat import BAT
from prunetune.pruning.methods.divprune import loneliest
from prunetune.pruning.ops.duplicates import without_duplicates_each
from prunetune.pruning.ops.greedy import pick_spread
from prunetune.pruning.ops.indexing import first_ranked, mask_of, mask_of_picks, rows_of, top_k
from prunetune.pruning.ops.similarity import cosine_distance, cosine_similarity
from prunetune.pruning.types import Selection, VisualTokens

REMOVED_PER_ROUND = 8  # VisPruner's published number


@dataclass(frozen=True)
class ItemBudgets:
    """What each of B items may keep, and how much of it by attention.

    Attributes:
        wanted: (B,) int64, how many tokens to keep.
        attended: (B,) int64, how many of them by attention, for the mixes.
        relative: (B,) complexity over the average.
        scale: factor of the threshold, equation 6.
        tau_max: cap of the threshold.
    """

    wanted: Int[Tensor, " B"]
    attended: Int[Tensor, " B"]
    relative: Float[Tensor, " B"]
    scale: float
    tau_max: float


Variant = Callable[[VisualTokens, ItemBudgets], Selection]


def threshold_walk(tokens: VisualTokens, budgets: ItemBudgets) -> Selection:
    """Walk the tokens by falling attention; each that is kept removes those nearer than its threshold.

    Equation 6. A token's state is minus its rank by attention; removing it takes N away, so that removed tokens come
    after all others, and among themselves by attention. The walk then is "pick the highest state, let the pick's row
    lower the others", which is what the greedy selections share: it runs in their kernel.
    """
    order = _by_attention(tokens)
    distance = cosine_distance(rows_of(tokens.finite("projected"), order))  # (B, N, N), by rank
    rank = torch.arange(tokens.count, device=order.device, dtype=torch.float32)
    near = _removes(distance, rank, budgets)
    removed = torch.where(near, -(rank + tokens.count), 0)
    most = int(budgets.wanted.max())  # items that keep fewer walk on; what they pick then does not count
    picks = pick_spread(removed, -rank.expand_as(order), most, "minimum")
    kept = mask_of_picks(order.gather(1, picks), budgets.wanted, tokens.count)
    return selection_of(kept, budgets.wanted)


def _removes(
    distance: Float[Tensor, "B N N"],
    rank: Float[Tensor, " N"],
    budgets: ItemBudgets,
) -> Bool[Tensor, "B N N"]:
    """Return whether keeping the token of a row removes that of a column, both by rank."""
    threshold = (rank + 1) * budgets.scale * budgets.relative[:, None]  # (B, N)
    return distance < threshold.clamp(max=budgets.tau_max)[..., None]


def ran_dry(tokens: VisualTokens, budgets: ItemBudgets, selection: Selection) -> Bool[Tensor, " B"]:
    """Return for which items (B,) the walk ended before the budget was met, and removed tokens filled it.

    A walk that does not run dry keeps no token that an earlier kept one removes: one such pair says that it did.
    """
    order = _by_attention(tokens)
    distance = cosine_distance(rows_of(tokens.finite("projected"), order))  # (B, N, N), by rank
    rank = torch.arange(tokens.count, device=order.device, dtype=torch.float32)
    kept = torch.zeros_like(order, dtype=torch.bool)
    for item in range(len(kept)):
        kept[item, selection.of(item)] = True
    by_rank = kept.gather(1, order)
    pair = by_rank[:, :, None] & by_rank[:, None, :] & (rank[:, None] < rank[None, :])
    return (pair & _removes(distance, rank, budgets)).any(dim=2).any(dim=1)


def mixed_with_vispruner(tokens: VisualTokens, budgets: ItemBudgets) -> Selection:
    """Keep the attended tokens, and of the others those left when VisPruner's rounds have removed duplicates."""
    order = _by_attention(tokens)
    kept = first_ranked(order, budgets.attended)
    similarity = cosine_similarity(tokens.finite("features"), dtype=torch.float64)  # for VisPruner's reason
    left = (budgets.wanted - budgets.attended).tolist()
    diverse = without_duplicates_each(similarity, order, budgets.attended.tolist(), left, REMOVED_PER_ROUND)
    return selection_of(kept | diverse, budgets.wanted)


def mixed_with_bat(tokens: VisualTokens, budgets: ItemBudgets) -> Selection:
    """Keep the attended tokens, and the others as BAT's merged clusters."""
    return BAT().mixed(tokens, budgets.wanted, budgets.attended)


def mixed_with_divprune(tokens: VisualTokens, budgets: ItemBudgets) -> Selection:
    """Keep the tokens FasterVLM keeps, and the tokens farthest from all kept, by DivPrune's rule."""
    kept = first_ranked(_by_attention(tokens), budgets.attended)
    distance = cosine_distance(tokens.finite("projected"))
    # Without attended tokens there is nothing to be far from: the item starts as DivPrune does.
    first = loneliest(distance, torch.zeros_like(kept))
    alone = mask_of(first[:, None], tokens.count)
    kept = torch.where(budgets.attended[:, None] > 0, kept, alone)
    to_kept = distance.masked_fill(~kept[:, None, :], float("inf"))
    nearest = to_kept.amin(dim=-1)  # (B, N)
    left = budgets.wanted - budgets.attended.clamp(min=1)
    # Items that need fewer go on picking; what they pick then does not count.
    picks = pick_spread(distance, nearest, max(int(left.max()), 0), "minimum", kept)
    return selection_of(kept | mask_of_picks(picks, left, tokens.count), budgets.wanted)


def _by_attention(tokens: VisualTokens) -> Int[Tensor, "B N"]:
    """Return all positions (B, N), the most attended first."""
    return top_k(tokens.finite("cls_attention").mean(dim=1), tokens.count)


def selection_of(
    kept: Bool[Tensor, "B N"],
    wanted: Int[Tensor, " B"],
) -> Selection:
    """Return a mask (B, N) with ``wanted`` (B,) tokens per item as a selection, ragged where the numbers differ.

    The mask ``[[True, False, True], [False, True, False]]`` with ``[2, 1]`` gives the positions ``[[0, 2], [1]]``.
    """
    positions = kept.nonzero()[:, 1]
    numbers = wanted.tolist()
    if len(set(numbers)) == 1:
        return Selection(positions.view(len(numbers), -1))
    return Selection(list(positions.split(numbers)))
