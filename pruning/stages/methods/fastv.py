"""FastV: the tokens that the last prompt token looks at, once, in an early layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from prunetune.pruning.budget import Budget
from prunetune.pruning.stages.base import Choice, Heard, Stage, best, heard, over_rows
from prunetune.pruning.stages.registry import register_stage


@register_stage("fastv", paper="FastV, arXiv 2403.06764")
@dataclass(frozen=True)
class FastV(Stage):
    """Keep the visual tokens with the highest attention of the last prompt token, the mean over the heads of layer K-1.

    K is the boundary. What stays keeps its order and its positions.

    Differs from the published code: it chooses once, at the prefill, and not again at each step without a cache; every
    row of a batch has its own count; padding and answers are never asked. The paper's words are "attention from all
    tokens"; as in the code it is the last one's.
    """

    boundaries: ClassVar[tuple[int, ...]] = (2,)
    keeps: ClassVar[tuple[Budget, ...]] = (0.5,)
    hears: ClassVar[frozenset[str]] = frozenset({"attention"})

    def choose(self, at: Heard, keep: Sequence[int]) -> Choice:
        """Return the most attended visual slots."""
        attention = heard(at.attention, "attention").mean(dim=1)  # (B, 1, n)
        score = over_rows(attention, heard(at.rows, "rows"))
        return Choice(best(score, at.visual, keep))
