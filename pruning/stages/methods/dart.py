"""DART: a few pivots, and the tokens that are least like each of them; no attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunetune.pruning.budget import Budget
from prunetune.pruning.options import check_least
from prunetune.pruning.stages.base import Choice, Heard, Stage, heard, ranked
from prunetune.pruning.stages.registry import register_stage


@register_stage("dart", paper="DART, arXiv 2502.11494")
@dataclass(frozen=True)
class DART(Stage):
    """Keep pivots and what is least like them.

    Pivots are the visual and the text tokens behind the image whose keys of layer K-1, after rotation, have the largest
    L1 norm. Each in turn, visual pivots by norm and then text pivots, adds the tokens not yet taken whose states (the
    output of layer K-1 after the model's final norm) have the lowest cosine to its own. What stays keeps its positions.

    Of a budget that does not come out even the first pivots add one token more; the paper's counts, 4 + 8 t, do.

    Differs from the published code: pivots are visited by norm (there in the order of a Python set, which changes 4 to
    15 % of what is kept); text pivots are of the prompt alone; every row of a batch for itself; a budget is kept
    exactly. The norm of rotated keys depends on positions, which count from a row's first token.

    Attributes:
        image_pivots: pivots among visual tokens; with a smaller budget as many as that.
        text_pivots: pivots among text tokens, or as many as there are.
    """

    image_pivots: int = 4
    text_pivots: int = 4

    boundaries: ClassVar[tuple[int, ...]] = (2,)
    keeps: ClassVar[tuple[Budget, ...]] = (132,)
    hears: ClassVar[frozenset[str]] = frozenset({"keys", "normed"})

    def __post_init__(self) -> None:
        check_least("image_pivots", self.image_pivots, 1)
        check_least("text_pivots", self.text_pivots, 0)

    def choose(self, at: Heard, keep: Sequence[int]) -> Choice:
        """Return pivots and what is least like them."""
        norm = heard(at.keys, "keys").abs().sum(dim=2)  # (B, n)
        states = torch.nn.functional.normalize(heard(at.normed, "normed"), dim=2)
        wanted = torch.minimum(torch.tensor(list(keep), device=norm.device), at.visual.sum(dim=1))  # (B,)
        images = ranked(norm, at.visual)[:, : self.image_pivots]
        texts = ranked(norm, at.question)[:, : self.text_pivots]
        own = _first(wanted, images.shape[1])
        exist = torch.cat([own, _first(at.question.sum(dim=1), texts.shape[1])], dim=1)  # (B, P)
        kept = torch.zeros_like(at.visual).scatter(1, images, own)
        left = wanted - own.sum(dim=1)
        return Choice(_around(states, at.visual, kept, torch.cat([images, texts], dim=1), exist, left))


def _first(counts: Int[Tensor, " B"], width: int) -> Bool[Tensor, "B w"]:
    """Return which of ``width`` places are among the first of each row."""
    return torch.arange(width, device=counts.device) < counts[:, None]


def _around(
    states: Float[Tensor, "B n D"],
    visual: Bool[Tensor, "B n"],
    kept: Bool[Tensor, "B n"],
    pivots: Int[Tensor, "B P"],
    exist: Bool[Tensor, "B P"],
    left: Int[Tensor, " B"],
) -> Bool[Tensor, "B n"]:
    """Return the visual slots that are kept when each pivot has added its own.

    Args:
        states: of length 1.
        visual: which slots can be kept.
        kept: which are: those of the visual pivots.
        pivots: slots, in the order of their turns.
        exist: which of them there are.
        left: how many slots each row is still to keep.
    """
    for number in range(pivots.shape[1]):
        turns = exist[:, number:].sum(dim=1).clamp(min=1)
        share = torch.where(exist[:, number], (left + turns - 1) // turns, 0)
        pivot = states.gather(1, pivots[:, number, None, None].expand(-1, 1, states.shape[2]))
        likeness = (states @ pivot.transpose(1, 2))[:, :, 0].masked_fill(~visual | kept, float("inf"))
        # A stable sort: of equally unlike tokens the lower index.
        order = torch.sort(likeness, dim=1, stable=True).indices
        kept = kept | torch.zeros_like(kept).scatter(1, order, _first(share, order.shape[1]))
        left = left - share
    return kept
