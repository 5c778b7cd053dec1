"""What became of every visual token of an image under one arm: kept, merged into another, dropped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prunetune.evaluation.visual.merging import TracedSelection
from prunetune.pruning.rewrite import Chosen
from prunetune.pruning.vision import NEWLINE

DROPPED, KEPT, MERGED, INSIDE, OUTSIDE = range(5)
"""A token is dropped before the LLM; reaches it; is part of another that does; reaches it and is dropped between its
layers; or has no place in the sequence at all, such as the padding of a crop, which the model cuts away."""

WORDS = ("dropped", "kept", "merged", "inside", "outside")
"""The states by their numbers, as files call them."""


@dataclass(frozen=True)
class States:
    """What became of T tokens.

    Attributes:
        state: (T,) one of the five.
        into: (T,) of a merged token the kept one in which it weighs most; -1 of all others.
        foreign: (T,) which kept tokens give their place to something that is none of them, such as [CLS].
        traced: whether it is known what was merged into what; if not, merged tokens count as dropped.
    """

    state: np.ndarray
    into: np.ndarray
    foreign: np.ndarray
    traced: bool = True

    def centres(self) -> np.ndarray:
        """Return which tokens (T,) others were merged into."""
        found = np.zeros(len(self.state), dtype=bool)
        found[self.into[self.into >= 0]] = True
        return found

    def counts(self) -> dict[str, int]:
        """Return how many tokens there are of each state, without those that have no place in the sequence."""
        return {word: int((self.state == number).sum()) for number, word in enumerate(WORDS) if number != OUTSIDE}

    @property
    def reaching(self) -> int:
        """How many tokens reach the LLM."""
        return int(np.isin(self.state, (KEPT, INSIDE)).sum())


def states_of(choice: Chosen, lost: Tensor | None = None) -> States:
    """Return what became of the tokens of one modality of a prompt.

    Args:
        choice: what a traced pruner kept.
        lost: the numbers of those that reach the LLM and not its last layer; None where nothing is dropped inside it.
    """
    vision = choice.vision
    there = torch.zeros(vision.total, dtype=torch.bool, device=vision.slots[0].device)
    origin = torch.cat(vision.origin)
    there[origin[origin != NEWLINE]] = True
    kept = choice.kept_tokens() & there
    into, traced = _merged_into(choice)
    # What went into a token that has no place in the sequence is dropped with it.
    into = torch.where(kept | ~there | ~kept[into.clamp(min=0)], -1, into)
    state = torch.full((vision.total,), DROPPED, dtype=torch.int8, device=there.device)
    state[into >= 0] = MERGED
    state[kept] = KEPT
    state[~there] = OUTSIDE
    if lost is not None:
        state[lost] = INSIDE
    foreign = _foreign(choice) & kept
    return States(state.cpu().numpy(), into.cpu().numpy(), foreign.cpu().numpy(), traced)


def _foreign(choice: Chosen) -> Tensor:
    """Return which tokens (T,) give their place to an output that was made around none of them."""
    found = torch.zeros(choice.vision.total, dtype=torch.bool, device=choice.vision.slots[0].device)
    for among, selection in zip(choice.candidates, choice.selections, strict=True):
        for item, origin in enumerate(selection.origin or ()):
            slots = among.numbers[item, selection.slots_of(item)]
            found[slots[origin < 0]] = True
    return found


def _merged_into(choice: Chosen) -> tuple[Tensor, bool]:
    """Return for each token (T,) the one in which it weighs most, or -1; and whether that is known."""
    device = choice.vision.slots[0].device
    into = torch.full((choice.vision.total,), -1, dtype=torch.long, device=device)
    traced = True
    for among, selection in zip(choice.candidates, choice.selections, strict=True):
        shares = selection.shares if isinstance(selection, TracedSelection) else None
        if shares is None:
            traced = traced and selection.merged is None
            continue
        for item, own in enumerate(shares):
            part = own / own.abs().sum(dim=1, keepdim=True).clamp(min=1e-12)  # of each output
            largest, output = part.abs().max(dim=0)  # (N,)
            slots = among.numbers[item, selection.slots_of(item)]
            # Rounding leaves some thousandths of a percent of everything in everything.
            into[among.numbers[item]] = torch.where(largest > 1e-5, slots[output], -1)
    return into, traced
