"""HoloV: the raster sequence is cut into runs, and every run keeps its share of the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunetune.pruning.ops.indexing import ascending, ranks_of, rows_of, top_k
from prunetune.pruning.ops.output_order import copies
from prunetune.pruning.options import check_choice, check_least
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all

TINY = 1e-6  # published, in every denominator
ATTENTION_SCALE = 1000.0  # published


@register_pruner("holov", paper="HoloV, arXiv 2510.02912", golden=True)
@dataclass(frozen=True)
class HoloV:
    """Share the budget among consecutive runs of tokens by their mean attention, and keep each run's most attended.

    A run's score is the mean of its [CLS] attention, times 1000, plus ``alpha`` times the variance of its tokens'
    cosines brought to the attention's scale. That scaling divides by the variance's own mean, so features all but
    cancel: the score is 1.09 times the attention (the published code's arithmetic, kept as it is).

    Differs from the published code: tokens allotted beyond a run's length go to runs with room (there they are lost and
    zero vectors pad the output; ``overflow: published``); without any attention the runs share evenly; tokens stay in
    raster order (``order: published`` hands them on run by run, the most attended of each first).

    Attributes:
        runs: how many runs (published: 16; at 24 x 24 a run is one and a half rows).
        alpha: weight of the cosines' variance (published: 0.09).
        overflow: "redistribute" or "published".
        order: "raster" or "published", which needs ``position_policy: compact``.
    """

    runs: int = 16
    alpha: float = 0.09
    overflow: str = "redistribute"
    order: str = "raster"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attention"})

    def __post_init__(self) -> None:
        """Check the options."""
        check_least("runs", self.runs, 1)
        check_least("alpha", self.alpha, 0)
        check_choice("overflow", self.overflow, ("redistribute", "published"))
        check_choice("order", self.order, ("raster", "published"))

    @property
    def merges(self) -> bool:
        """Whether outputs are copies of tokens and zero vectors in an order of their own."""
        return "published" in (self.overflow, self.order)

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K); with a published option also where each output comes from."""
        if keep == tokens.count:
            return keep_all(tokens)
        attention = tokens.finite("cls_attention").mean(dim=1)  # (B, N)
        members, real = run_members(tokens.count, self.runs, attention.device)  # (R, w) each
        weights = self._weights(tokens.finite("projected"), attention, members, real)
        length = real.sum(dim=-1)  # (R,)
        seats = shared(weights, keep, once=self.overflow == "published").clamp(max=length)
        if self.overflow == "redistribute":
            left = keep - seats.sum(dim=-1)
            seats = seats + dealt(length - seats, weights, left, members.shape[1])

        place = self._places(attention, members, real, seats)  # (B, N), where each token comes in the output
        # What zero vectors take up are the slots of the most attended that were not kept.
        is_kept = place < tokens.count
        by_attention = ranks_of(top_k(attention, tokens.count))
        chosen = torch.where(is_kept, place, tokens.count + by_attention).argsort(dim=1)[:, :keep]
        if not self.merges:
            return Selection(ascending(chosen))
        return copies(chosen, tokens.count, self.order == "published", real=is_kept.gather(1, chosen))

    def _weights(
        self,
        projected: Float[Tensor, "B N D"],
        attention: Float[Tensor, "B N"],
        members: Int[Tensor, "R w"],
        real: Bool[Tensor, "R w"],
    ) -> Float[Tensor, "B R"]:
        """Return the share of each run, float64."""
        batch, _, width = projected.shape
        length = real.sum(dim=-1)  # (R,)
        pairs = (length - 1).clamp(min=1)[:, None]  # (R, 1)
        unit = projected / (torch.linalg.vector_norm(projected, dim=-1, keepdim=True) + TINY)
        in_runs = rows_of(unit, members.flatten().expand(batch, -1)).view(batch, *members.shape, width)
        in_runs = in_runs * real[..., None]
        cosine = (in_runs @ in_runs.transpose(-1, -2)).double()  # (B, R, w, w)
        cosine.diagonal(dim1=-2, dim2=-1).zero_()
        mean = cosine.sum(dim=-1) / pairs  # (B, R, w)
        # A token's own entry, which is 0, counts among the deviations as well.
        deviation = (cosine - mean[..., None]).square() * real[:, None, :]
        variance = deviation.sum(dim=-1) / pairs * real

        own = attention.double()[:, members] * real  # (B, R, w)
        scaled = ATTENTION_SCALE * own
        level = scaled.sum(dim=-1) / length  # (B, R)
        spread = variance.sum(dim=-1) / length
        factor = level / (spread + TINY)
        score = level + self.alpha * factor * spread
        score = torch.where(length > 1, score, own.sum(dim=-1))  # a run of one token is not scaled, as published
        total = score.sum(dim=-1, keepdim=True)
        # Without any attention the published 0 / 1e-6 leaves everything to the index.
        return torch.where(total > 0, score / (total + TINY), 1 / len(length))

    def _places(
        self,
        attention: Float[Tensor, "B N"],
        members: Int[Tensor, "R w"],
        real: Bool[Tensor, "R w"],
        seats: Int[Tensor, "B R"],
    ) -> Int[Tensor, "B N"]:
        """Return the place of each token in the published order, and N for those that are not kept."""
        count = attention.shape[1]
        length = real.sum(dim=-1)
        own = attention[:, members].masked_fill(~real, float("-inf"))  # (B, R, w)
        rank = ranks_of(top_k(own, members.shape[1]))
        within = torch.arange(members.shape[1], device=rank.device)
        # A run that is kept whole comes in raster order, as published.
        place = torch.where((seats == length)[..., None], within, rank)
        place = place + members[:, :1]  # runs one after another
        place = torch.where(rank < seats[..., None], place, count)
        return place.flatten(1)[:, real.flatten()]


def run_members(
    count: int,
    runs: int,
    device: torch.device,
) -> tuple[Int[Tensor, "R w"], Bool[Tensor, "R w"]]:
    """Return the positions of each run's tokens, padded to the longest run, and which of them are real.

    Of 5 tokens in 2 runs: ``[[0, 1, 2], [3, 4, 4]]``, the last entry being padding.
    """
    runs = min(runs, count)  # more runs than tokens would be empty
    base, longer = divmod(count, runs)
    number = torch.arange(runs, device=device)
    start = number * base + number.clamp(max=longer)
    length = base + (number < longer).long()
    within = torch.arange(base + (longer > 0), device=device)
    members = start[:, None] + within
    return members.clamp(max=count - 1), within < length[:, None]


def shared(
    weights: Float[Tensor, "B R"],
    keep: int,
    once: bool,
) -> Int[Tensor, "B R"]:
    """Return the seats (B, R) of ``keep`` by weight, rounded down; what is left goes one each to the heaviest.

    Args:
        weights: (B, R), summing to 1 or less.
        keep: K.
        once: whether a run gets one of what is left at most, as published; else until all K are dealt.
    """
    seats = (weights * keep).floor().long()
    left = keep - seats.sum(dim=-1, keepdim=True)  # (B, 1)
    runs = weights.shape[1]
    turn = ranks_of(top_k(weights, runs))
    more = (turn < left).long()
    if not once:
        more = left.div(runs, rounding_mode="floor") + (turn < left % runs).long()
    return seats + more


def dealt(
    room: Int[Tensor, "B R"],
    weights: Float[Tensor, "B R"],
    number: Int[Tensor, " B"],
    most: int,
) -> Int[Tensor, "B R"]:
    """Return how many of ``number`` (B,) each run gets when they are dealt one by one, the heaviest with room first.

    Room ``[[3, 1, 0]]``, weights falling and the number ``[3]`` give ``[[2, 1, 0]]``. There is room for all.
    """
    order = top_k(weights, weights.shape[1])
    room = room.gather(1, order)
    # After t full rounds a run has min(room, t); the last round is cut short.
    rounds = torch.arange(most + 1, device=room.device)
    after = torch.minimum(room[..., None], rounds).sum(dim=1)  # (B, T)
    full = (after <= number[:, None]).sum(dim=1, keepdim=True) - 1  # (B, 1)
    left = number[:, None] - after.gather(1, full)
    has_room = room > full
    turn = has_room.long().cumsum(dim=1)  # from 1
    given = torch.minimum(room, full) + (has_room & (turn <= left)).long()
    return torch.empty_like(given).scatter(1, order, given)
