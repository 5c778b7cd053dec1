"""PyramidDrop: a share of the tokens in each of several layers, by what the last prompt token looks for there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from prunetune.pruning.budget import Budget
from prunetune.pruning.options import check_choice
from prunetune.pruning.stages.base import Choice, Heard, Stage, best, heard, over_rows
from prunetune.pruning.stages.registry import register_stage


@register_stage("pyramiddrop", paper="PyramidDrop, arXiv 2410.17247")
@dataclass(frozen=True)
class PyramidDrop(Stage):
    """Keep at each boundary the visual tokens that the last prompt token attends to most in the boundary's own layer.

    Shares are of the tokens that entered the LLM, rounded down. In training the mean over the tokens before each answer
    counts, and a row without any answer stays whole.

    Differs from the published code: any batch and padding, decoding included; text-only rows of a batch use up no
    image; the values are not projected for nothing.

    Attributes:
        positions: numbered anew ("dense", as published), or those of the prompt ("original").
    """

    positions: str = "dense"

    boundaries: ClassVar[tuple[int, ...]] = (8, 16, 24)
    keeps: ClassVar[tuple[Budget, ...]] = (0.5, 0.25, 0.125)
    listens: ClassVar[int] = 0
    hears: ClassVar[frozenset[str]] = frozenset({"attention"})
    queries: ClassVar[str] = "answers"
    needs_answer: ClassVar[bool] = True
    rounds_down: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("positions", self.positions, ("original", "dense"))

    @property
    def dense(self) -> bool:
        """Whether what stays is numbered anew."""
        return self.positions == "dense"

    def choose(self, at: Heard, keep: Sequence[int]) -> Choice:
        """Return the most attended visual slots."""
        attention = heard(at.attention, "attention").mean(dim=1)  # (B, Q, n)
        score = over_rows(attention, heard(at.rows, "rows"))
        return Choice(best(score, at.visual, keep))
