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
ORDERS = ("rank", "pick")
REFILLS = ("attention", "farthest", "again")


@dataclass(frozen=True)
class ItemBudgets:
    """What each of B items may keep, and how much of it by attention.

    Attributes:
        wanted: (B,) int64, how many tokens to keep.
        attended: (B,) int64, how many of them by attention, for the mixes.
        relative: (B,) complexity over the average.
        scale: factor of the threshold, equation 6.
        tau_max: cap of the threshold.
        order: what its order counts, one of ``ORDERS``.
        refill: what follows when the pool runs dry, one of ``REFILLS``.
    """

    wanted: Int[Tensor, " B"]
    attended: Int[Tensor, " B"]
    relative: Float[Tensor, " B"]
    scale: float
    tau_max: float
    order: str = "rank"
    refill: str = "attention"


Variant = Callable[[VisualTokens, ItemBudgets], Selection]


def threshold_walk(tokens: VisualTokens, budgets: ItemBudgets) -> Selection:
    """Walk the tokens by falling attention; each that is kept removes those nearer than its threshold.

    Equation 6. The selection's notes say how many of an item's tokens the walk picked and whether it ran dry.
    """
    attention_order = _by_attention(tokens)
    distance = cosine_distance(rows_of(tokens.finite("projected"), attention_order))  # (B, N, N), by rank
    most = int(budgets.wanted.max())  # items that keep fewer walk on; what they pick then does not count
    if budgets.order == "rank" and budgets.refill == "attention":
        picks, walking = _walk_of_ranks(distance, budgets, most)
    else:
        picks, walking = _walk(distance, budgets, most)
    step = torch.arange(most, device=picks.device)
    walked = (walking & (step < budgets.wanted[:, None])).sum(dim=1)
    notes = {"walked": walked, "ran_dry": walked < budgets.wanted}
    kept = mask_of_picks(attention_order.gather(1, picks), budgets.wanted, tokens.count)
    selection = selection_of(kept, budgets.wanted)
    return Selection(selection.indices, notes=notes)


def _walk_of_ranks(
    distance: Float[Tensor, "B N N"],
    budgets: ItemBudgets,
    most: int,
) -> tuple[Int[Tensor, "B K"], Bool[Tensor, "B K"]]:
    """Return ``most`` picks (B, K) by rank, and which of them the walk made before it ran dry.

    A token's state is minus its rank by attention; removing it takes N away, so that removed tokens come after all
    others, and among themselves by attention. The walk then is "pick the highest state, let the pick's row lower the
    others", which is what the greedy selections share: it runs in their kernel.
    """
    batch, count, _ = distance.shape
    rank = torch.arange(count, device=distance.device, dtype=torch.float32)
    threshold = (rank + 1) * budgets.scale * budgets.relative[:, None]  # (B, N)
    near = distance < threshold.clamp(max=budgets.tau_max)[..., None]  # (B, by, whom)
    removed = torch.where(near, -(rank + count), 0)
    picks = pick_spread(removed, -rank.expand(batch, count), most, "minimum")
    # A pick that an earlier one is near to was removed, and is a refill: those of the walk are near to none before.
    among = rows_of(near, picks).gather(2, picks[:, None].expand(-1, most, -1))  # (B, by, whom), by step
    return picks, ~among.triu(1).any(dim=1)


def _walk(
    distance: Float[Tensor, "B N N"],
    budgets: ItemBudgets,
    most: int,
) -> tuple[Int[Tensor, "B K"], Bool[Tensor, "B K"]]:
    """Return the same for any order and refill, step by step.

    A token's state is minus its rank, and N less for every time it was removed: the pools are bands of states.
    """
    batch, count, _ = distance.shape
    items = torch.arange(batch, device=distance.device)
    rank = torch.arange(count, device=distance.device)
    removals = torch.zeros(batch, count, dtype=torch.long, device=distance.device)
    taken = torch.zeros_like(removals, dtype=torch.bool)
    nearest = torch.full_like(distance[:, 0], float("inf"))  # distance to the nearest kept token
    picks, walking = [], []
    for step in range(most):
        state = (-rank - count * removals).masked_fill(taken, -count * (most + 2)).to(torch.float64)
        is_walking = (~taken & (removals == 0)).any(dim=1)
        if budgets.refill == "farthest":
            farthest = nearest.masked_fill(taken, -1).to(state)
            state = torch.where(is_walking[:, None], state, farthest)
        pick = state.argmax(dim=1)  # (B,)
        order = pick if budgets.order == "rank" else torch.full_like(pick, step)
        threshold = ((order + 1) * budgets.scale * budgets.relative).clamp(max=budgets.tau_max)
        to_pick = distance[items, pick]  # (B, N)
        pool = removals[items, pick]
        is_removed = (to_pick < threshold[:, None]) & (removals == pool[:, None])
        if budgets.refill != "again":
            is_removed &= is_walking[:, None]
        removals = removals + is_removed.long()
        taken[items, pick] = True
        nearest = torch.minimum(nearest, to_pick)
        picks.append(pick)
        walking.append(is_walking)
    return torch.stack(picks, dim=1), torch.stack(walking, dim=1)


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
