"""Greedy coverage: tokens that resemble what nothing chosen resembles yet, K steps for a whole batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

NOTHING = 1e-9
"""A gain up to this is rounding: sums of N float32 differences, kept in float64."""


def pick_covering(
    similarity: Float[Tensor, "B N N"],
    keep: int,
    score: Callable[[Float[Tensor, "B N"]], Float[Tensor, "B N"]],
    fill: Float[Tensor, "B N"],
) -> Int[Tensor, "B K"]:
    """Pick ``keep`` tokens one by one, always the one with the highest ``score`` of what it adds to the coverage.

    A token is covered as much as it resembles the chosen token most like it, and at first not at all; what a candidate
    adds is the sum over all tokens by which it would raise that.

    Args:
        similarity: (B, N, N) float32, symmetric.
        keep: how many to pick.
        score: from gains (B, N) to what is compared.
        fill: (B, N) below 0, what is compared where no score is positive.

    Returns:
        (B, keep) positions in order of picking, all distinct; ties go to the lower index.
    """
    batch, count, _ = similarity.shape
    after_pick = _recounted if similarity.is_cuda else _where_changed
    cover = similarity.new_zeros(batch, count)
    gain = similarity.clamp(min=0).sum(dim=-1, dtype=torch.float64)  # (B, N)
    picks = torch.zeros(batch, keep, dtype=torch.long, device=similarity.device)
    items = torch.arange(batch, device=similarity.device)
    taken = torch.zeros_like(cover, dtype=torch.bool)
    for step in range(keep):
        # float32: of equal tokens the lower index wins, whatever the order of a sum did to the last bits.
        value = score(torch.where(gain > NOTHING, gain, 0).float())
        value = torch.where(value > 0, value, fill).masked_fill(taken, float("-inf"))
        pick = value.argmax(dim=-1)  # (B,)
        picks[:, step] = pick
        taken[items, pick] = True
        raised = torch.maximum(cover, similarity[items, pick])
        gain = after_pick(similarity, gain, cover, raised)
        cover = raised
    return picks


def _recounted(
    similarity: Float[Tensor, "B N N"],
    gain: Float[Tensor, "B N"],
    cover: Float[Tensor, "B N"],
    raised: Float[Tensor, "B N"],
) -> Float[Tensor, "B N"]:
    """Return the gains (B, N) under the raised cover, from all pairs: the device is never waited for."""
    return (similarity - raised[:, None, :]).clamp_(min=0).sum(dim=-1, dtype=torch.float64)


def _where_changed(
    similarity: Float[Tensor, "B N N"],
    gain: Float[Tensor, "B N"],
    cover: Float[Tensor, "B N"],
    raised: Float[Tensor, "B N"],
) -> Float[Tensor, "B N"]:
    """Return the same from the rows of those tokens whose cover rose: on a CPU how many there are costs nothing.

    The differences are float32 numbers that are taken away as they were counted in, so that float64 sums of them are
    those of :func:`_recounted` but for their last bits.
    """
    batch, count, _ = similarity.shape
    changed = (raised > cover).flatten().nonzero()[:, 0]  # (M,) tokens, counted through the batch
    rows = similarity.reshape(batch * count, count).index_select(0, changed)  # (M, N)
    before = (rows - cover.flatten()[changed, None]).clamp_(min=0).double()
    before -= rows.sub_(raised.flatten()[changed, None]).clamp_(min=0)
    return gain.index_add(0, changed // count, before, alpha=-1)
