"""What a stage reads at a boundary (``Heard``), what it answers (``Choice``) and what it is (``Stage``).

Layers are counted from 0. The *boundary* b is the first layer that sees the shorter sequence. A *slot* is a place in
the sequence as it is at a boundary, a *column* one in the prompt as it entered the LLM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunetune.pruning.budget import Budget, check_budget, share_of
from prunetune.pruning.errors import PruningError


@dataclass(frozen=True)
class Heard:
    """The B rows of a batch with n slots each, as they are at a boundary; of what follows only what the stage hears.

    Attributes:
        visual: (B, n) which slots hold visual tokens, merged ones included.
        question: (B, n) which slots hold text of the prompt behind the first visual token, up to the last prompt token.
        attention: (B, H, Q, n) float32, softmax of the query rows in each head; zeros in rows that do not exist. What
            is multiplied are the layer's own queries and keys, in the model's precision.
        rows: (B, Q) which query rows exist.
        keys: (B, n, H * d) float32, keys after rotation, heads side by side.
        states: (B, n, D) float32, output of the layer below the boundary.
        normed: (B, n, D) float32, the same through the model's final norm.
        unit_scores: (B, Q, n) float32, what queries and keys of ones alone would score before the softmax.
        counts: of each row how many visual slots there are; empty where nobody counted.
    """

    visual: Bool[Tensor, "B n"]
    question: Bool[Tensor, "B n"]
    attention: Float[Tensor, "B H Q n"] | None = None
    rows: Bool[Tensor, "B Q"] | None = None
    keys: Float[Tensor, "B n C"] | None = None
    states: Float[Tensor, "B n D"] | None = None
    normed: Float[Tensor, "B n D"] | None = None
    unit_scores: Float[Tensor, "B Q n"] | None = None
    counts: Sequence[int] = ()


def heard(value: Tensor | None, name: str) -> Tensor:
    """Return something that was heard.

    Raises:
        PruningError: if it was not.
    """
    if value is None:
        raise PruningError(f"this stage reads `{name}`, which was not computed; list it in the stage's `hears`")
    return value


@dataclass(frozen=True)
class Merged:
    """Visual tokens that are made of dropped ones, of each row another number.

    Attributes:
        mixing: (B, M, n) how much of every slot each takes; weights and not states, so that gradients reach these.
        centres: (B, M) the slot that each was made around.
        counts: of each row how many of the M there are.
    """

    mixing: Float[Tensor, "B M n"]
    centres: Int[Tensor, "B M"]
    counts: Sequence[int]


@dataclass(frozen=True)
class Choice:
    """What a stage keeps.

    Attributes:
        kept: (B, n) which visual slots stay.
        merged: what takes the place of dropped ones; it stands behind the last visual token that stays.
    """

    kept: Bool[Tensor, "B n"]
    merged: Merged | None = None


class Stage:
    """A method with its hyperparameters: a frozen dataclass, based on this class, whose fields are its options.

    Attributes:
        boundaries: the paper's, for the model it names first.
        keeps: the paper's budget at each of them: tokens, or shares of those that entered the LLM.
        listens: which layer is heard, counted from the boundary: -1 is the one below it, 0 its own.
        hears: names of :class:`Heard`'s tensors; nothing else is computed.
        queries: whose attention is heard: the ``last`` prompt token's, that before each of the ``answers``, or that of
            tokens that the stage finds itself, ``raters``.
        needs_answer: whether rows of a training batch without a supervised token stay as they are.
        drops_all: whether no visual token is left.
        rounds_down: whether a share of the tokens is rounded down; else half to even.
    """

    boundaries: ClassVar[tuple[int, ...]] = ()
    keeps: ClassVar[tuple[Budget, ...]] = ()
    listens: ClassVar[int] = -1
    hears: ClassVar[frozenset[str]] = frozenset()
    queries: ClassVar[str] = "last"
    needs_answer: ClassVar[bool] = False
    drops_all: ClassVar[bool] = False
    rounds_down: ClassVar[bool] = False

    @property
    def wants(self) -> frozenset[str]:
        """What is heard with the options as they are."""
        return self.hears

    @property
    def merges(self) -> bool:
        """Whether tokens are made of dropped ones."""
        return False

    @property
    def dense(self) -> bool:
        """Whether what stays is numbered anew, 0, 1, 2, ...; else it keeps its positions, gaps included."""
        return False

    def count(self, keep: Budget, entering: int) -> int:
        """Return the number of tokens that a budget means for a row with ``entering`` visual tokens; 0 is none.

        Raises:
            PruningError: if it is no budget, or a share that rounds to no token.
        """
        if is_nothing(keep):
            return 0
        share = share_of(check_budget(keep))
        if share is None:
            return min(int(keep), entering)
        # Far above the rounding of such a product, and far below the share of one token.
        wanted = int(share * entering + 1e-9) if self.rounds_down else round(share * entering)
        if entering and not wanted:
            least = math.ceil(10_000 / entering) / 10_000
            raise PruningError(
                f"keep={keep!r} of {entering} visual tokens rounds to 0; the smallest budget is {least:.4f}, and "
                "keep: 0 withdraws them all"
            )
        return wanted

    def after(self, entering: int, keep: int) -> int:
        """Return how many tokens there are when ``keep`` of ``entering`` are kept, merged ones included."""
        return min(keep, entering)

    def raters(
        self, embeddings: Float[Tensor, "B L D"], visual: Bool[Tensor, "B L"], question: Bool[Tensor, "B L"]
    ) -> Bool[Tensor, "B L"]:
        """Return whose attention is heard, of stages with ``queries`` raters, by what enters the first layer."""
        raise NotImplementedError

    def choose(self, at: Heard, keep: Sequence[int]) -> Choice:
        """Choose ``keep`` visual slots of each row; a row that has no more is left alone whatever is answered."""
        raise NotImplementedError


def is_nothing(keep: Budget) -> bool:
    """Return whether a budget is 0, which no pruner has and a stage may have."""
    return keep == 0 and not isinstance(keep, (bool, str))


def best(score: Float[Tensor, "B n"], visual: Bool[Tensor, "B n"], keep: Sequence[int]) -> Bool[Tensor, "B n"]:
    """Return the visual slots (B, n) with the highest scores, of each row as many as ``keep`` says.

    Ties go to the lower index. Scores ``[[0.5, 0.9, 0.5, 0.7]]``, all visual but the second, with ``keep`` 2 give
    ``[[True, False, False, True]]``.
    """
    order = ranked(score, visual)
    numbers = torch.tensor(list(keep), device=score.device)
    chosen = torch.arange(order.shape[1], device=score.device) < numbers[:, None]
    return torch.zeros_like(visual).scatter(1, order, chosen) & visual


def ranked(score: Float[Tensor, "B n"], visual: Bool[Tensor, "B n"]) -> Int[Tensor, "B n"]:
    """Return the slots (B, n) of each row: visual ones before others, each by descending score, ties by index."""
    order = torch.sort(score, dim=1, descending=True, stable=True).indices
    others_last = torch.sort((~visual).gather(1, order).long(), dim=1, stable=True).indices
    return order.gather(1, others_last)


def over_rows(values: Float[Tensor, "B Q n"], rows: Bool[Tensor, "B Q"]) -> Float[Tensor, "B n"]:
    """Return the mean over the query rows that exist."""
    there = rows[:, :, None].to(values)
    return (values * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)
