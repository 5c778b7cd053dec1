"""Runs what is missing of the study, one training or score after another, each stored when it is finished."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from findings_study.plan import Group, Projector, Score, training_key
from findings_study.scoring import right_answers
from findings_study.store import Store, Weights
from findings_study.training import PICTURES, Recipe, train
from findings_study.world import World


class Runner:
    """The world, the stored rows, and what makes the missing ones."""

    def __init__(self, world: World, store: Store, say: Callable[[str], None]) -> None:
        self.world, self.store, self.say = world, store, say
        self.group = ""

    def key(self, score: Score) -> str:
        """Return the key of a score."""
        return score.key(self.world.hash, self.world.scenes[score.split])

    def missing(self, group: Group) -> list[Score]:
        """Return the scores of a group that are not stored."""
        return [score for score in group.scores if self.key(score) not in self.store.rows]

    def untrained(self, group: Group) -> list[Recipe]:
        """Return the trainings that a group's missing scores need."""
        needed = Group(group.name, group.asks, tuple(self.missing(group))).recipes()
        return [recipe for recipe in needed if self.store.weights(self.training_key_of(recipe)) is None]

    def run(self, group: Group) -> None:
        """Make what is missing of a group."""
        self.group = group.name
        missing = self.missing(group)
        for number, score in enumerate(missing):
            began = time.perf_counter()
            projector = self.world.projector(self._weights(score.projector))
            chooser = projector
            if score.chooser is not None:
                chooser = (
                    self.world.projector(self._weights(score.chooser)) if score.chooser.parts else self.world.original
                )
            elif not score.projector.parts:
                projector = chooser = self.world.original
            right = right_answers(self.world, projector, chooser, score.cell, score.split)
            row = {
                "key": self.key(score),
                "cell": str(score.cell),
                "split": score.split,
                "of": [self.training_key_of(recipe) for recipe in score.projector.parts],
                "right": "".join(map(str, right.tolist())),
            }
            self.store.add(self.group, row)
            percent = 100 * float(right.sum()) / (8 * len(right))
            took = time.perf_counter() - began
            self.say(f"{group.name} {number + 1}/{len(missing)}: {score.cell} {percent:.2f} ({took:.0f} s)")

    def training_key_of(self, recipe: Recipe) -> str:
        return training_key(recipe, self.world.hash, self.world.scenes["recalibration"])

    def _weights(self, projector: Projector) -> Any:
        return projector.weights(self._trained, self.world.original.state_dict())

    def _trained(self, recipe: Recipe) -> Weights:
        key = self.training_key_of(recipe)
        stored = self.store.weights(key)
        if stored is not None:
            return stored
        trained = train(self.world, recipe, self.say)
        weights = {"last": trained.last, "ema": trained.ema}
        self.store.add_weights(key, weights)
        tail = trained.losses[-25:]
        row = {
            "key": key,
            "recipe": recipe.settings(),
            "seconds": round(trained.seconds, 1),
            "busy": round(trained.busy, 1),
            "loss": round(sum(tail) / len(tail), 4),
            "questions": recipe.steps * PICTURES * 8,
            "on": hardware(),
        }
        self.store.add(self.group, row)
        self.say(
            f"{self.group}: trained {key}, {recipe.steps} updates, {trained.seconds:.0f} s ({trained.busy:.0f} s busy)"
        )
        return weights


def hardware() -> str:
    """Return what this runs on, in words."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
    return f"{torch.get_num_threads()} of {os.cpu_count()} cores of {name}, PyTorch {torch.__version__}"
