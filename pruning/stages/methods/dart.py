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
        kept = torch.zeros_like(at.visual)
        images, texts = ranked(norm, at.visual), ranked(norm, at.question)
        # Row by row: rows have other numbers of pivots and tokens, and there are a dozen pivots.
        numbers = torch.stack([at.visual.sum(dim=1), at.question.sum(dim=1)], dim=1).tolist()
        for row, ((visual, question), wanted) in enumerate(zip(numbers, keep, strict=True)):
            wanted = min(wanted, visual)
            own = images[row, : min(self.image_pivots, wanted)]
            pivots = torch.cat([own, texts[row, : min(self.text_pivots, question)]])
            kept[row] = _around(states[row], at.visual[row], own, pivots, wanted)
        return Choice(kept)


def _around(
    states: Float[Tensor, "n D"],
    visual: Bool[Tensor, " n"],
    own: Int[Tensor, " I"],
    pivots: Int[Tensor, " P"],
    keep: int,
) -> Bool[Tensor, " n"]:
    """Return the slots that one row keeps, of states of length 1."""
    kept = torch.zeros_like(visual)
    kept[own] = True
    left = keep - len(own)
    for number, pivot in enumerate(pivots):
        share = left // (len(pivots) - number) + (left % (len(pivots) - number) > 0)
        likeness = (states @ states[pivot]).masked_fill(~visual | kept, float("inf"))
        # A stable sort: of equally unlike tokens the lower index.
        kept[torch.sort(likeness, stable=True).indices[:share]] = True
        left -= share
    return kept
