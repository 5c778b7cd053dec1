"""Stored rows as numbers: right answers of a projector's seeds in a cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from findings_study.intervals import Estimate, accuracy, difference
from findings_study.plan import (
    GRID,
    ORIGINAL,
    Projector,
    Score,
    elastic,
    long_specialist,
    one,
    short_elastic,
    specialist,
)
from findings_study.running import Runner
from findings_study.training import Recipe
from findings_study.world import DENSE, Cell

BySeed = Callable[[int], Projector]
"""A projector by its seed."""
NONE = "-"


def untrained(seed: int) -> Projector:
    """Return the original projector, which has no seed."""
    return ORIGINAL


def trained(make: Callable[..., Recipe], *settings: Any, **changes: Any) -> BySeed:
    """Return what trainings of one recipe end with, by seed."""
    return lambda seed: one(make(*settings, seed=seed, **changes))


def special(cell: Cell, **changes: Any) -> BySeed:
    """Return the specialist of a cell."""
    return trained(specialist, cell, **changes)


def special_long(cell: Cell) -> BySeed:
    """Return the specialist of the elastic run's length."""
    return trained(long_specialist, cell)


def full(**changes: Any) -> BySeed:
    """Return the elastic projector, or one whose recipe differs."""
    return trained(elastic, **changes)


def brief(**changes: Any) -> BySeed:
    """Return an elastic projector of an eighth of the updates."""
    return trained(short_elastic, **changes)


def changed(made: BySeed, **changes: Any) -> BySeed:
    """Return the same trainings with another kind or strength of weights."""
    return lambda seed: replace(made(seed), **changes)


class Results:
    """What is stored, by what was trained and scored; where something is missing, what is there of it.

    Args:
        runner: knows the keys.
        seeds: how many there are at most.
    """

    def __init__(self, runner: Runner, seeds: int) -> None:
        self.runner, self.seeds = runner, seeds

    def right(self, made: BySeed, cells: Cell | Sequence[Cell], chooser: BySeed | None = None) -> np.ndarray | None:
        """Return right answers (S, N) of the seeds that have all cells, as means over them; None where no seed has."""
        cells = [cells] if isinstance(cells, Cell) else list(cells)
        found = []
        for seed in range(1 if made is untrained and chooser is None else self.seeds):
            projector = made(seed)
            by_cell = [self._one(Score(projector, cell, chooser and chooser(seed))) for cell in cells]
            there = [values for values in by_cell if values is not None]
            if len(there) == len(cells):
                found.append(np.mean(there, axis=0))
        return np.stack(found) if found else None

    def each_own(
        self, made: Callable[[Cell], BySeed] = special, cells: Sequence[Cell] = GRID, without_pruning: bool = False
    ) -> np.ndarray | None:
        """Return the mean over cells where each has a projector of its own, in its cell or without pruning."""
        by_cell = [self.right(made(cell), DENSE if without_pruning else cell) for cell in cells]
        there = [values for values in by_cell if values is not None]
        if len(there) < len(cells):
            return None
        least = min(map(len, there))
        mean: np.ndarray = np.mean([values[:least] for values in there], axis=0)
        return mean

    def _one(self, score: Score) -> np.ndarray | None:
        row = self.runner.store.rows.get(self.runner.key(score))
        return None if row is None else np.array([int(digit) for digit in row["right"]])

    def accuracy(self, made: BySeed, cells: Cell | Sequence[Cell], chooser: BySeed | None = None) -> Estimate | None:
        """Return the accuracy in a cell, or its mean over several."""
        right = self.right(made, cells, chooser)
        return None if right is None else accuracy(right)

    def above(self, made: BySeed, other: BySeed, cells: Cell | Sequence[Cell]) -> Estimate | None:
        """Return by how many points one is above another, picture by picture."""
        return gap(self.right(made, cells), self.right(other, cells))

    def seconds(self, recipe: Recipe) -> float | None:
        """Return what one training kept a core busy for, in seconds, as the median over seeds."""
        found = []
        for seed in range(self.seeds):
            key = self.runner.training_key_of(replace(recipe, seed=seed))
            row = self.runner.store.rows.get(key)
            if row is not None:
                found.append(row["busy"])
        return median(found) if found else None


def gap(first: np.ndarray | None, second: np.ndarray | None) -> Estimate | None:
    """Return the difference of two sets of right answers, or None where one is missing."""
    return None if first is None or second is None else difference(first, second)


def said(estimate: Estimate | None, signed: bool = False) -> str:
    """Return a number with its interval for a table."""
    if estimate is None:
        return NONE
    return estimate.signed() if signed else estimate.plain()


def short(estimate: Estimate | None) -> str:
    """Return a number alone."""
    return NONE if estimate is None else f"{estimate.value:.1f}"


def mean_of(right: np.ndarray | None) -> Estimate | None:
    """Return the accuracy of right answers, or None where there are none."""
    return None if right is None else accuracy(right)
