"""VTW: all visual tokens are withdrawn in a middle layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prunetune.pruning.budget import Budget
from prunetune.pruning.errors import PruningError
from prunetune.pruning.options import check_choice
from prunetune.pruning.stages.base import Choice, Heard, Stage
from prunetune.pruning.stages.registry import register_stage


@register_stage("vtw", paper="VTW, arXiv 2405.05803")
@dataclass(frozen=True)
class VTW(Stage):
    """Withdraw every visual token at the boundary; layer 15 is the paper's for the 7B model.

    Differs from the published code: any batch and any mask, of which nothing is remembered in a class.

    Attributes:
        positions: of what is left: its own, or numbered anew ("dense").
    """

    positions: str = "original"

    boundaries: ClassVar[tuple[int, ...]] = (15,)
    keeps: ClassVar[tuple[Budget, ...]] = (0,)
    drops_all: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("positions", self.positions, ("original", "dense"))

    @property
    def dense(self) -> bool:
        """Whether what stays is numbered anew."""
        return self.positions == "dense"

    def choose(self, at: Heard, keep: Sequence[int]) -> Choice:
        """Return no visual slot."""
        return Choice(torch.zeros_like(at.visual))


def search_boundary(
    full: Float[Tensor, "S V"], withdrawn: Float[Tensor, "S K V"], first: int, eta: float
) -> tuple[int, Float[Tensor, " K"]]:
    """Return the first boundary at which withdrawing changes little, and how much each changes.

    A boundary's change is the mean over samples of KL(withdrawn || full) of the last token's logits.

    Args:
        full: logits of S samples with all tokens.
        withdrawn: the same with all visual tokens withdrawn at each of K boundaries.
        first: the first of these boundaries, counted from 0.
        eta: the largest change; the paper's is 0.003 for 7B models.

    Raises:
        PruningError: if every boundary changes more.
    """
    change = torch.stack([changes(full, one) for one in withdrawn.unbind(dim=1)], dim=1).mean(dim=0)  # (K,)
    return first_small(change, first, eta), change.float()


def changes(full: Float[Tensor, "S V"], withdrawn: Float[Tensor, "S V"]) -> Float[Tensor, " S"]:
    """Return KL(withdrawn || full) of each sample's logits, in float64."""
    log_full, log_withdrawn = full.double().log_softmax(dim=-1), withdrawn.double().log_softmax(dim=-1)
    change: Tensor = (log_withdrawn.exp() * (log_withdrawn - log_full)).sum(dim=-1)
    return change


def first_small(change: Float[Tensor, " K"], first: int, eta: float) -> int:
    """Return the first boundary whose change is small, of K that begin with ``first``.

    Raises:
        PruningError: if every boundary changes more.
    """
    small = (change <= eta).nonzero()
    if not len(small):
        raise PruningError(
            f"no boundary changes the answers by {eta:g} or less, the least is {float(change.min()):g}; choose a "
            "larger eta"
        )
    return first + int(small[0])
