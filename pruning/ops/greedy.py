"""Greedy selection, K steps for a whole batch: plain tensor updates; on CUDA one Triton kernel runs all K steps."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunetune.pruning.ops import greedy_triton

EXHAUSTED = 1e-6
"""A DPP's remaining volume below this share of its largest quality counts as none: the rank is used up."""


def pick_spread(
    matrix: Float[Tensor, "B N N"],
    state: Float[Tensor, "B N"],
    keep: int,
    update: str,
    blocked: Bool[Tensor, "B N"] | None = None,
) -> Int[Tensor, "B K"]:
    """Pick ``keep`` tokens one by one: always the highest ``state``, which the pick's row of ``matrix`` then updates.

    With distances and ``update="minimum"`` this is farthest point sampling (max-min); with negated similarities and
    ``update="add"`` it is RepMax. With the distances ``[[[0, 1, 5], [1, 0, 4], [5, 4, 0]]]`` and the state
    ``[[0, 1, 5]]`` two picks by "minimum" are ``[[2, 1]]``.

    Args:
        matrix: (B, N, N) float32.
        state: (B, N) float32, finite; the first pick is its maximum.
        keep: how many to pick; an item that runs out of tokens that are not blocked repeats index 0.
        update: "minimum" or "add".
        blocked: (B, N) boolean, tokens that must not be picked.

    Returns:
        (B, keep) positions in order of picking, distinct while there are any; ties go to the lower index.
    """
    state = state.clone() if blocked is None else state.masked_fill(blocked, float("-inf"))
    # A step is five small kernels: 64 steps would be 320 launches on a GPU, where the Triton kernel is one.
    if greedy_triton.usable(matrix):
        return greedy_triton.pick_spread(matrix, state, keep, update)
    picks = torch.zeros(len(state), keep, dtype=torch.long, device=state.device)
    items = torch.arange(len(state), device=state.device)
    for step in range(keep):
        # The pick stays on the device: reading it back would make every step wait.
        pick = state.argmax(dim=-1)  # (B,)
        picks[:, step] = pick
        row = matrix[items, pick]  # (B, N)
        state = torch.minimum(state, row) if update == "minimum" else state + row
        state[items, pick] = float("-inf")  # neither minimum() nor + brings it back, so no token is picked twice
    return picks


def pick_determinantal(
    similarity: Float[Tensor, "B N N"],
    quality: Float[Tensor, "B N"],
    keep: int,
    blocked: Bool[Tensor, "B N"] | None = None,
    rank_by: Float[Tensor, "B N"] | None = None,
) -> Int[Tensor, "B K"]:
    """Pick ``keep`` tokens by greedy MAP of a DPP with kernel ``diag(q) S diag(q)``, by incremental Cholesky factors.

    Where the kernel's rank is used up before K, the tokens of highest quality fill the rest.

    Args:
        similarity: (B, N, N) float32, cosine.
        quality: (B, N) float32, not negative.
        keep: how many to pick; an item that runs out of tokens that are not blocked repeats index 0.
        blocked: (B, N) boolean, tokens that must not be picked.
        rank_by: (B, N) not negative, by which tokens fill up where the rank is used up; None is the quality.

    Returns:
        (B, keep) positions in order of picking, distinct while there are any; ties go to the lower index.
    """
    tiny = torch.finfo(torch.float32).tiny
    volume = similarity.diagonal(dim1=1, dim2=2) * quality.square()  # (B, N) what each token would add
    if blocked is not None:
        volume = volume.masked_fill(blocked, 0)
    floor = EXHAUSTED * volume.amax(dim=-1, keepdim=True)  # (B, 1)
    # Of tokens that add no volume the best has rank -1, the others follow in [-2, -1): below every volume, above the
    # -inf of what is picked.
    rank_by = quality if rank_by is None else rank_by
    largest = rank_by.amax(dim=-1, keepdim=True).clamp(min=tiny)
    fill = rank_by / largest - 2  # (B, N)
    if blocked is not None:
        volume = volume.masked_fill(blocked, float("-inf"))
    if greedy_triton.usable(similarity) and keep * similarity.shape[1] <= greedy_triton.LARGEST_FACTOR:
        return greedy_triton.pick_determinantal(similarity, quality, volume, fill, floor[:, 0], keep)
    picks = torch.zeros(len(quality), keep, dtype=torch.long, device=quality.device)
    items = torch.arange(len(quality), device=quality.device)
    # A new factor per step costs O(step * N), where the determinants themselves would cost O(N^3) each.
    factors = similarity.new_zeros(len(quality), keep, quality.shape[1])  # (B, K, N) rows of the Cholesky factor
    for step in range(keep):
        rank = torch.where(volume > floor, volume, torch.minimum(volume, fill))
        pick = rank.argmax(dim=-1)  # (B,)
        picks[:, step] = pick
        of_pick = quality[items, pick][:, None]
        row = similarity[items, pick] * quality * of_pick  # (B, N), the kernel's row
        known = factors[:, :step]  # (B, step, N)
        column = known[items, :, pick]  # (B, step)
        row -= torch.bmm(column[:, None], known)[:, 0]
        rest = volume[items, pick][:, None]  # (B, 1)
        # A pick without volume has nothing to take from the others; dividing by its rounding would.
        scaled = row / rest.clamp(min=tiny).sqrt()
        row = torch.where(rest > floor, scaled, 0)
        factors[:, step] = row
        volume = volume - row.square()
        volume[items, pick] = float("-inf")
    return picks
