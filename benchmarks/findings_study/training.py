"""Training a projector for a cell or for many, with eight questions of a picture in one row."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from findings_study.rows import Texts
from findings_study.world import DENSE, Cell, Pool, World
from prunetune.train.objectives import terms

PICTURES = 16
"""Pictures of one update, each with its eight questions."""
WARMUP = 0.03
EMA = 0.99
ANSWERS = ("ce", "gce", "kl")
"""Terms of the tokens of answers."""


@dataclass(frozen=True)
class Recipe:
    """How a projector is trained; two recipes that are equal give the same weights.

    Attributes:
        cells: the settings with the weight that each is drawn with; dense has its own share.
        terms: the objective, by name and weight.
        steps: updates of 16 pictures.
        scenes: how many scenes there are, drawn by the seed from those of the recalibration range.
        learning_rate: its peak.
        seed: of the scenes, their order and all draws.
        groups: parts of an update with a cell of their own each.
        dense: chance that a part keeps all visual tokens.
        sandwich: the first part of an update is dense, the second has the smallest budget.
        choose_with: which projector the pruner chooses by, ``tuned`` or ``original``.
        gce_q: of ``gce``.
        hidden_layer: the layer that ``hidden`` compares; 0 is the last.
    """

    cells: tuple[tuple[Cell, float], ...]
    terms: tuple[tuple[str, float], ...] = (("ce", 1.0),)
    steps: int = 125
    scenes: int = 2000
    learning_rate: float = 5e-3
    seed: int = 0
    groups: int = 1
    dense: float = 0.0
    sandwich: bool = False
    choose_with: str = "tuned"
    gce_q: float = 0.7
    hidden_layer: int = 0

    def settings(self) -> dict[str, Any]:
        """Return it as JSON can write it."""
        found: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return found | {"cells": [[str(cell), weight] for cell, weight in self.cells]}


@dataclass
class Trained:
    """Weights after the last update, their running mean, and what the training took on the clock and of its core."""

    last: dict[str, Tensor]
    ema: dict[str, Tensor]
    losses: list[float]
    seconds: float
    busy: float


def train(world: World, recipe: Recipe, say: Callable[[str], None] | None = None) -> Trained:
    """Train a copy of the original projector; everything else is frozen."""
    pool = world.pool("recalibration")
    projector = world.projector()
    projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    warmup = math.ceil(WARMUP * recipe.steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, recipe.steps)
    mean = {name: value.detach().clone() for name, value in projector.state_dict().items()}
    draws = np.random.default_rng([recipe.seed, 1])
    prepare(world, recipe)
    losses, began, busy = [], time.perf_counter(), time.process_time()
    for step, index in zip(range(recipe.steps), batches(recipe, pool.count), strict=False):
        parts = parts_of(recipe, index, draws)
        losses.append(backward(world, projector, recipe, parts, draws))
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for name, value in projector.state_dict().items():
            mean[name].lerp_(value, 1 - EMA)
        if say is not None and (step + 1) % 100 == 0:
            say(f"  step {step + 1} of {recipe.steps}, loss {np.mean(losses[-100:]):.3f}")
    seconds = time.perf_counter() - began
    last = {name: value.detach().clone() for name, value in projector.state_dict().items()}
    return Trained(last, mean, losses, seconds, time.process_time() - busy)


def prepare(world: World, recipe: Recipe) -> None:
    """Compute what is computed once for all trainings now, so that its time is none of this one's."""
    pool, first = world.pool("recalibration"), torch.zeros(1, dtype=torch.long)
    for cell, _ in recipe.cells:
        positions(pool, first, cell, world.original, np.random.default_rng(0))
    terms_asked = dict(recipe.terms)
    if "hidden" in terms_asked:
        pool.teacher(recipe.hidden_layer or None)
    if "kl" in terms_asked:
        pool.teacher()


def batches(recipe: Recipe, pool: int) -> Iterator[Tensor]:
    """Yield the scenes of each update: pass after pass over the recipe's own, each in another order."""
    draws = np.random.default_rng([recipe.seed, 0])
    own = draws.permutation(pool)[: recipe.scenes]
    waiting: list[int] = []
    while True:
        while len(waiting) < PICTURES:
            waiting += draws.permutation(own).tolist()
        yield torch.tensor(waiting[:PICTURES])
        waiting = waiting[PICTURES:]


def parts_of(recipe: Recipe, index: Tensor, draws: np.random.Generator) -> dict[Cell, Tensor]:
    """Deal the scenes of an update to cells; parts that drew the same cell run together."""
    cells = [cell for cell, _ in recipe.cells]
    weights = np.array([weight for _, weight in recipe.cells])
    smallest = min(cell.keep for cell in cells)
    found: dict[Cell, list[Tensor]] = {}
    for number, part in enumerate(index.chunk(recipe.groups)):
        own = weights
        if recipe.sandwich and number == 1:
            own = weights * np.array([cell.keep == smallest for cell in cells])
        dense = draws.random() < recipe.dense
        cell = cells[draws.choice(len(cells), p=own / own.sum())]
        if recipe.sandwich and number < 2:
            dense = number == 0
        found.setdefault(DENSE if dense else cell, []).append(part)
    return {cell: torch.cat(parts) for cell, parts in found.items()}


def backward(
    world: World, projector: nn.Module, recipe: Recipe, parts: Mapping[Cell, Tensor], draws: np.random.Generator
) -> float:
    """Add the gradient of one update to the projector's and return the loss."""
    pool = world.pool("recalibration")
    index = torch.cat(list(parts.values()))
    answers = int(pool.texts.is_asked[index].sum())
    text = int(pool.texts.is_text[index].sum())
    units = dict.fromkeys(ANSWERS, answers) | {"hidden": text, "feature": len(index)}
    weights = dict(recipe.terms)
    whole = 0.0
    for cell, own in parts.items():
        chooser = projector if recipe.choose_with == "tuned" else world.original
        kept = positions(pool, own, cell, chooser, draws)
        summed = sums(world, projector, recipe, own, kept)
        loss = torch.zeros(())
        for name, part in summed.items():
            loss = loss + weights[name] * part / units[name]
        loss.backward()  # type: ignore[no-untyped-call]
        whole += float(loss.detach())
    return whole


def positions(pool: Pool, index: Tensor, cell: Cell, chooser: nn.Module, draws: np.random.Generator) -> Tensor | None:
    """Return what is kept of some scenes (B, K); None for everything."""
    if cell.pruner is None:
        return None
    if cell.pruner == "fresh":
        drawn = draws.random((len(index), pool.features.shape[1])).argsort(axis=1)[:, : cell.keep]
        return torch.from_numpy(np.sort(drawn, axis=1))
    return pool.chosen(index, cell, chooser)


def visual_tokens(pool: Pool, index: Tensor, kept: Tensor | None, projector: nn.Module) -> Tensor:
    """Return the visual tokens (B, K, D) that reach the LLM."""
    features = pool.features[index]
    if kept is not None:
        features = features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
    tokens: Tensor = projector(features)
    return tokens


def sums(world: World, projector: nn.Module, recipe: Recipe, index: Tensor, kept: Tensor | None) -> dict[str, Tensor]:
    """Return the terms of some scenes that keep some tokens, each summed over its units."""
    pool = world.pool("recalibration")
    names = {name for name, _ in recipe.terms}
    visual = visual_tokens(pool, index, kept, projector)
    found = {}
    if "feature" in names:
        with torch.no_grad():
            teacher = visual_tokens(pool, index, None, world.original).mean(dim=1)
        found["feature"] = terms.feature(visual.mean(dim=1), teacher)
    answered = names.intersection(ANSWERS)
    if not answered and "hidden" not in names:
        return found
    texts = (pool.texts if "hidden" in names else pool.short).at(index)
    layers = recipe.hidden_layer or None
    assert layers is None or not answered  # this study compares inner layers alone
    rows = world.rows(visual, texts)
    if "hidden" not in names:
        return found | _answers(world, recipe, world.states(rows, texts.is_asked), texts, index, answered)
    states = world.states(rows, texts.is_text, layers)
    aim = pool.teacher(layers)[index, : texts.ids.shape[1]]
    found["hidden"] = terms.hidden(states, aim[texts.is_text])
    if answered:
        found |= _answers(world, recipe, states[texts.is_asked[texts.is_text]], texts, index, answered)
    return found


def _answers(
    world: World, recipe: Recipe, states: Tensor, texts: Texts, index: Tensor, names: set[str]
) -> dict[str, Tensor]:
    logits, targets = world.head(states), texts.targets[texts.is_asked]
    found = {}
    if "ce" in names:
        found["ce"] = terms.ce(logits, targets)
    if "gce" in names:
        found["gce"] = terms.gce(logits, targets, recipe.gce_q)
    if "kl" in names:
        pool = world.pool("recalibration")
        with torch.no_grad():
            aim = world.head(pool.teacher()[index][pool.texts.is_asked[index]])
        found["kl"] = terms.kl(logits, aim)
    return found
