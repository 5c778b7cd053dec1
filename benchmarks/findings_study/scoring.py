"""Which questions are answered right, for every question of a split at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from findings_study.rows import NOWHERE
from findings_study.training import visual_tokens
from findings_study.world import AT_ONCE, Cell, World


@torch.no_grad()
def right_answers(world: World, projector: nn.Module, chooser: nn.Module, cell: Cell, split: str) -> Tensor:
    """Return how many of its eight questions each scene's picture answers right, (S,).

    Greedy generation gives an answer exactly if every token of it, and the end behind it, is the most likely one after
    those before it. So all of them are read off one forward pass over the right answers.

    Args:
        world: the model and its scenes.
        projector: whose tokens the LLM reads.
        chooser: by whose tokens pruners choose that read them.
        cell: what is kept.
        split: whose scenes.
    """
    pool = world.pool(split)
    found = []
    for first in range(0, pool.count, AT_ONCE):
        index = torch.arange(first, min(first + AT_ONCE, pool.count))
        kept = None if cell.pruner is None else pool.chosen(index, cell, chooser)
        texts = pool.short.at(index)
        asked = texts.is_asked
        states = world.states(world.rows(visual_tokens(pool, index, kept, projector), texts), asked)
        said: Tensor = world.head(states).argmax(-1)
        wrong = torch.zeros_like(asked)
        wrong[asked] = said != texts.targets[asked]
        questions = int(texts.question.max()) + 1
        missed = torch.zeros(len(index), questions, dtype=torch.bool)
        scene, place = wrong.nonzero(as_tuple=True)
        missed[scene, texts.question[scene, place]] = True
        assert (texts.question[wrong] != NOWHERE).all()
        found.append((~missed).sum(1))
    return torch.cat(found)
