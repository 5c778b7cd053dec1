"""What is trained and what is scored: the groups of the study, the most important first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from findings_study.store import Weights
from findings_study.training import Recipe
from findings_study.world import BY_PROJECTOR, DENSE, STUDY, Cell, hash_of

PRUNERS = ("fastervlm", "vispruner", "prismprune", "divprune")
BUDGETS = (8, 16, 36, 72)
GRID = tuple(Cell(pruner, keep) for pruner in PRUNERS for keep in BUDGETS)
UNSEEN = tuple(Cell(pruner, keep) for pruner in ("fps", "random") for keep in BUDGETS)
EIGHT = tuple(cell for cell in GRID if cell.keep in (16, 36))
AT_16 = tuple(cell for cell in GRID if cell.keep == 16)
DIV_16, FPS_16 = Cell("divprune", 16), Cell("fps", 16)
WEIGHTS = {"divprune": 3.0, "vispruner": 1.5, "prismprune": 1.0, "fastervlm": 1.0}
ROBUST = (("gce", 1.0), ("hidden", 1.0))
LONG, MANY = 1000, 6000


@dataclass(frozen=True)
class Projector:
    """A projector as it is made of trained ones.

    Attributes:
        parts: the trainings whose weights are averaged; none is the original projector.
        kind: weights after the last update, ``last``, or their running mean, ``ema``.
        strength: how far the way from the original weights is gone, 0 to 1.
    """

    parts: tuple[Recipe, ...] = ()
    kind: str = "last"
    strength: float = 1.0

    def settings(self) -> dict[str, Any]:
        """Return it as JSON can write it."""
        return {"parts": [part.settings() for part in self.parts], "kind": self.kind, "strength": self.strength}

    def weights(self, trained: Callable[[Recipe], Weights], original: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return its tensors."""
        if not self.parts:
            return original
        own = [trained(part)[self.kind] for part in self.parts]
        found = {}
        for name, start in original.items():
            mean = sum(weights[name] for weights in own) / len(own)
            found[name] = start + self.strength * (mean - start)
        return found


ORIGINAL = Projector()


@dataclass(frozen=True)
class Score:
    """Answers of one projector in one cell.

    Attributes:
        projector: whose tokens the LLM reads.
        cell: what is kept.
        chooser: by whose tokens pruners choose that read them; None is the same projector.
        split: whose scenes are asked about.
    """

    projector: Projector
    cell: Cell
    chooser: Projector | None = None
    split: str = "test"

    def key(self, world: str, scenes: int) -> str:
        """Return the hash of everything that the score depends on."""
        chooser = self.chooser or self.projector
        if self.cell.pruner not in BY_PROJECTOR:
            chooser = ORIGINAL
        made = [self.projector.settings(), chooser.settings()]
        return hash_of(["score", STUDY, world, scenes, made, str(self.cell), self.split])


def training_key(recipe: Recipe, world: str, pool: int) -> str:
    """Return the hash of everything that a training depends on."""
    return hash_of(["training", STUDY, world, pool, recipe.settings()])


CHOSEN = {"chosen": LONG, "longer": 2 * LONG}
"""Groups whose recipe, of so many updates, validation scenes choose: see :mod:`findings_study.tries`."""


@dataclass(frozen=True)
class Group:
    """One part of the study: what it asks, and its scores in the order in which they are made."""

    name: str
    asks: str
    scores: tuple[Score, ...]

    def recipes(self) -> list[Recipe]:
        """Return the trainings that it needs."""
        found: dict[Recipe, None] = {}
        for score in self.scores:
            for projector in (score.projector, score.chooser or ORIGINAL):
                found |= dict.fromkeys(projector.parts)
        return list(found)


def one(recipe: Recipe) -> Projector:
    """Return the projector that one training ends with."""
    return Projector((recipe,))


def specialist(cell: Cell, seed: int = 0, **changes: Any) -> Recipe:
    """Return the papers' recipe for one cell: cross entropy, 125 updates."""
    return replace(Recipe(((cell, 1.0),), seed=seed), **changes)


def long_specialist(cell: Cell, seed: int = 0) -> Recipe:
    """Return a specialist with as many updates and scenes as the elastic projector has."""
    return specialist(cell, seed, steps=LONG, scenes=MANY)


def elastic(
    seed: int = 0, weights: dict[str, float] | None = None, budgets: dict[int, float] | None = None, **changes: Any
) -> Recipe:
    """Return the recipe of one projector for the whole grid.

    Args:
        seed: of the scenes, their order and all draws.
        weights: how often each pruner is drawn.
        budgets: and each budget.
        changes: whatever else differs from the recipe.
    """
    weights = WEIGHTS if weights is None else weights
    budgets = dict.fromkeys(BUDGETS, 1.0) if budgets is None else budgets
    cells = []
    for pruner in PRUNERS:
        for keep, often in budgets.items():
            cells.append((Cell(pruner, keep), weights[pruner] * often / sum(budgets.values())))
    recipe = Recipe(tuple(cells), ROBUST, LONG, MANY, seed=seed, groups=4, dense=0.25)
    return replace(recipe, **changes)


def short_elastic(seed: int = 0, **changes: Any) -> Recipe:
    """Return the same with an eighth of the updates, to compare recipes by."""
    return elastic(seed, **({"steps": 125, "scenes": 2000} | changes))


def tuned_on_dense(seed: int = 0) -> Recipe:
    """Return a control that sees the questions, and never a pruned picture."""
    return specialist(DENSE, seed, dense=1.0)


def tuned_on_random(seed: int = 0) -> Recipe:
    """Return a control whose positions are drawn afresh for every picture."""
    cells = tuple((Cell("fresh", keep), 1.0) for keep in BUDGETS)
    return Recipe(cells, seed=seed, groups=4)


def soup(seed: int = 0) -> Projector:
    """Return the mean of the four specialists at 16 tokens."""
    return Projector(tuple(specialist(cell, seed) for cell in AT_16))


OBJECTIVES: dict[str, dict[str, Any]] = {
    "ce": {"terms": (("ce", 1.0),)},
    "gce": {"terms": (("gce", 1.0),)},
    "kl": {"terms": (("kl", 1.0),)},
    "hidden": {"terms": (("hidden", 1.0),)},
    "hidden, layer 2 of 3": {"terms": (("hidden", 1.0),), "hidden_layer": 2},
    "feature": {"terms": (("feature", 1.0),)},
    "ce + hidden": {"terms": (("ce", 1.0), ("hidden", 1.0))},
    "gce + hidden": {"terms": ROBUST},
    "kl + hidden": {"terms": (("kl", 1.0), ("hidden", 1.0))},
}
LARGE = {8: 1.0, 16: 1.0, 36: 2.0, 72: 2.0}
ALL_THREE = (("gce", 1.0), ("kl", 1.0), ("hidden", 1.0))
TOGETHER: dict[str, Any] = {"dense": 0.4, "terms": ALL_THREE, "groups": 8, "weights": WEIGHTS | {"divprune": 4.0}}
TRIES: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "dense share 0.4": {"dense": 0.4},
    "gce + kl + hidden": {"terms": ALL_THREE},
    "hidden with weight 3": {"terms": (("gce", 1.0), ("hidden", 3.0))},
    "ce + hidden": {"terms": (("ce", 1.0), ("hidden", 1.0))},
    "kl + hidden": {"terms": (("kl", 1.0), ("hidden", 1.0))},
    "gce with q 0.4": {"gce_q": 0.4},
    "8 cells an update": {"groups": 8},
    "learning rate 1e-2": {"learning_rate": 1e-2},
    "divprune with weight 5": {"weights": WEIGHTS | {"divprune": 5.0}},
    "36 and 72 tokens twice as often": {"budgets": LARGE},
    "dense 0.4, gce + kl + hidden, 8 cells, divprune 4": TOGETHER,
    "the recipe, 2,000 updates": {"steps": 2000},
    "dense 0.4, gce + kl + hidden, 8 cells, divprune 4, 2,000 updates": TOGETHER | {"steps": 2000},
}
"""Other elastic recipes, compared on validation scenes."""
QUESTIONS = {1000: 125, 4000: 500, 16000: 2000, 48000: 6000}
"""Questions, and the scenes that they are about."""
RATES = (2e-3, 5e-3, 1e-2)
DENSE_SHARES = {"0": 0.0, "1/17": 1 / 17, "1/4": 0.25, "1/2": 0.5}
STRENGTHS = (0.25, 0.5, 0.75)


def _each(projector: Projector, cells: tuple[Cell, ...], **more: Any) -> Iterator[Score]:
    for cell in cells:
        yield Score(projector, cell, **more)


def _specialists(seeds: range) -> Iterator[Score]:
    for seed in seeds:
        for cell in (*AT_16, *(cell for cell in GRID if cell not in AT_16)):
            yield from _each(one(specialist(cell, seed)), (cell, DENSE))
    for seed in seeds:
        for cell in AT_16:
            yield from _each(one(specialist(cell, seed)), GRID)


def _elastic(seeds: range) -> Iterator[Score]:
    for seed in seeds:
        yield from _each(one(elastic(seed)), (*GRID, DENSE, *UNSEEN))


def _controls(seeds: range) -> Iterator[Score]:
    for seed in seeds:
        for projector in (one(tuned_on_dense(seed)), one(tuned_on_random(seed)), soup(seed)):
            yield from _each(projector, (*GRID, DENSE))


def _choices(seeds: range) -> Iterator[Score]:
    for seed in seeds:
        for cell in (DIV_16, FPS_16):
            tuned = one(specialist(cell, seed))
            frozen = one(specialist(cell, seed, choose_with="original"))
            for projector in (tuned, frozen):
                yield Score(projector, cell)
                yield Score(projector, cell, ORIGINAL)
                yield Score(ORIGINAL, cell, projector)
                yield Score(projector, DENSE)
        kept_choice = one(short_elastic(seed, choose_with="original"))
        yield from _each(kept_choice, (Cell("divprune", 8), DIV_16), chooser=ORIGINAL)
        yield from _each(one(short_elastic(seed)), (Cell("divprune", 8), DIV_16))


def _tries() -> Iterator[Score]:
    yield from _each(ORIGINAL, (*GRID, DENSE), split="validation")
    for cell in GRID:
        yield Score(one(specialist(cell)), cell, split="validation")
    for changes in TRIES.values():
        yield from _each(one(elastic(**changes)), (*GRID, DENSE), split="validation")


def _objectives(seeds: range) -> Iterator[Score]:
    for seed in seeds:
        for changes in OBJECTIVES.values():
            yield from _each(one(short_elastic(seed, **changes)), (*EIGHT, DENSE))


def _data(seeds: range) -> Iterator[Score]:
    for seed in seeds:
        for scenes in QUESTIONS.values():
            yield from _each(one(specialist(DIV_16, seed, scenes=scenes)), (DIV_16, DENSE))
            yield from _each(one(short_elastic(seed, scenes=scenes)), (*EIGHT, DENSE))


def _rates(seeds: range) -> Iterator[Score]:
    for seed in seeds:
        for rate in RATES:
            yield from _each(one(specialist(DIV_16, seed, learning_rate=rate)), (DIV_16, DENSE))
            yield from _each(one(short_elastic(seed, learning_rate=rate)), (*EIGHT, DENSE))


def _sampling(seeds: range) -> Iterator[Score]:
    even = dict.fromkeys(PRUNERS, 1.0)
    for seed in seeds:
        for share in DENSE_SHARES.values():
            yield from _each(one(short_elastic(seed, dense=share)), (*EIGHT, DENSE))
        yield from _each(one(short_elastic(seed, sandwich=True, dense=0.0)), (*EIGHT, DENSE))
        yield from _each(one(short_elastic(seed, groups=1)), (*EIGHT, DENSE))
        yield from _each(one(short_elastic(seed, weights=even)), (*EIGHT, DENSE))


def _weights(seeds: range) -> Iterator[Score]:
    for seed in seeds:
        for strength in STRENGTHS:
            yield from _each(Projector((elastic(seed),), strength=strength), (*EIGHT, DENSE))
            yield from _each(Projector((specialist(DIV_16, seed),), strength=strength), (DIV_16, DENSE))
        yield from _each(Projector((elastic(seed),), kind="ema"), (*EIGHT, DENSE))


def _long(seeds: range) -> Iterator[Score]:
    for seed in seeds:
        for cell in GRID:
            yield from _each(one(long_specialist(cell, seed)), (cell, DENSE))


def _long_data(seeds: range) -> Iterator[Score]:
    for seed in seeds:
        for scenes in (125, 500, 2000):
            yield from _each(one(elastic(seed, scenes=scenes)), (*EIGHT, DENSE))


def groups(seeds: int = 3) -> list[Group]:
    """Return the study in the order in which it is run.

    Args:
        seeds: how often every training is repeated; a seed decides scenes, their order and all draws.
    """
    every = range(seeds)
    made: list[tuple[str, str, Iterator[Score]]] = [
        ("base", "what pruning costs without training", _each(ORIGINAL, (*GRID, DENSE, *UNSEEN))),
        ("specialists", "one projector a cell, 125 updates, and what it does elsewhere", _specialists(every)),
        ("elastic", "one projector for every cell and none", _elastic(every)),
        ("controls", "tuned on dense pictures, on random positions, the mean of specialists", _controls(every)),
        ("choices", "who chooses: the tuned projector or the original one", _choices(every)),
        ("tries", "other elastic recipes, one seed, on validation scenes", _tries()),
        ("chosen", "the best of these of 1,000 updates, on test scenes", iter(())),
        ("longer", "the best of these of 2,000 updates, on test scenes", iter(())),
        ("objectives", "what is trained towards", _objectives(every)),
        ("data", "how many questions", _data(every)),
        ("rates", "learning rates", _rates(every)),
        ("sampling", "how settings are drawn", _sampling(every)),
        ("weights", "the dial and the running mean", _weights(every)),
        ("long", "specialists of the elastic run's length", _long(range(1))),
        ("long_more_seeds", "the same with the other seeds", _long(range(1, seeds))),
        ("long_data", "how many questions an elastic run of 1,000 updates needs", _long_data(every)),
    ]
    return [Group(name, asks, tuple(dict.fromkeys(scores))) for name, asks, scores in made]
