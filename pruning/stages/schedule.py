"""When stages run and how many tokens each leaves: boundaries, budgets, and averages solved into keep counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from prunetune.pruning.budget import Budget, check_budget
from prunetune.pruning.errors import PruningError
from prunetune.pruning.spec import StageSpec
from prunetune.pruning.stages.base import Stage, is_nothing
from prunetune.pruning.stages.registry import build_stage


@dataclass(frozen=True)
class Point:
    """One boundary.

    Attributes:
        boundary: the first layer that sees the shorter sequence.
        stage: what chooses there.
        name: of the stage.
        keep: its budget; None if it is solved for.
        step: which boundary of its stage it is, from 1.
    """

    boundary: int
    stage: Stage
    name: str
    keep: Budget | None
    step: int


@dataclass(frozen=True)
class Counts:
    """Visual tokens of one row of a batch.

    Attributes:
        entering: those that enter the LLM.
        keep: of each boundary how many of the entering tokens its stage is asked for.
        after: of each boundary how many there are behind it, merged ones included.
        layers: how many each layer processes.
    """

    entering: int
    keep: tuple[int, ...]
    after: tuple[int, ...]
    layers: tuple[int, ...]

    @property
    def final(self) -> int:
        """Visual tokens of the last layer."""
        return self.layers[-1]

    @property
    def average(self) -> float:
        """Visual tokens per layer, the mean over all layers."""
        return sum(self.layers) / len(self.layers)


@dataclass(frozen=True)
class Schedule:
    """All stages of a model, by boundary.

    Attributes:
        points: the boundaries, ascending.
        layers: L, the number of decoder layers.
        average: what is solved for: visual tokens per layer; None if every budget is given.
    """

    points: tuple[Point, ...]
    layers: int
    average: float | None = None

    def counts(self, entering: int) -> Counts:
        """Return the counts of a row with ``entering`` visual tokens.

        Raises:
            PruningError: for an average that can't be reached, with the least one that can.
        """
        if entering not in self._known:
            self._known[entering] = self._solve(entering)
        return self._known[entering]

    def keeping_all(self) -> Schedule:
        """Return a schedule of the same boundaries at which nothing is dropped."""
        return Schedule(tuple(replace(point, keep=None) for point in self.points), self.layers)

    def has_places_of(self, other: Schedule) -> bool:
        """Return whether two schedules differ in budgets alone: the same stages at the same boundaries."""
        places = [[(point.boundary, point.stage, point.name) for point in one.points] for one in (self, other)]
        return places[0] == places[1] and self.layers == other.layers

    @cached_property
    def _known(self) -> dict[int, Counts]:
        return {}

    def _solve(self, entering: int) -> Counts:
        if self.average is None or entering <= self.average:
            return self._with(entering, 1.0)
        # With this share one token is left of the last step that is solved for: none would be withdrawing the image.
        steps = max(point.step for point in self.points if point.keep is None)
        low, high = min(1.0, (1.0 / entering) ** (1.0 / steps) * (1 + 1e-9)), 1.0
        least = self._with(entering, low)
        if least.average > self.average:
            below = self._with(entering, 0.0).average
            raise PruningError(
                f"an average of {self.average:g} visual tokens per layer can't be reached with {entering} that enter "
                f"the LLM: the layers below the boundaries process {below:g} already, and with one token left at "
                f"the end the least is {math.ceil(100 * least.average) / 100:g}; choose more, lower boundaries, or "
                "prune before the LLM (pruning.keep)"
            )
        # The largest share whose integer counts stay under: closed forms are off by a token.
        for _ in range(60):
            middle = (low + high) / 2
            if self._with(entering, middle).average <= self.average:
                low = middle
            else:
                high = middle
        return self._with(entering, low)

    def _with(self, entering: int, share: float) -> Counts:
        """Return the counts where budgets that are solved for keep ``share`` to the power of their step."""
        keep: list[int] = []
        after: list[int] = []
        layers: list[int] = []
        now = entering
        for point in self.points:
            layers += [now] * (point.boundary - len(layers))
            if point.keep is None:
                wanted = math.floor(entering * share**point.step)
            else:
                wanted = point.stage.count(point.keep, entering)
            wanted = min(wanted, now)
            keep.append(wanted)
            now = point.stage.after(now, wanted) if wanted < now else now
            after.append(now)
        layers += [now] * (self.layers - len(layers))
        return Counts(entering, tuple(keep), tuple(after), tuple(layers))


def schedule_of(specs: Sequence[StageSpec], layers: int, lowest: int = 1, why: str = "") -> Schedule:
    """Return the schedule of a specification's stages.

    Args:
        specs: ``pruning.stages``.
        layers: L, the number of decoder layers.
        lowest: the lowest boundary that the model can have.
        why: why it is not 1, for the message.

    Raises:
        PruningError: for boundaries that the model has not, or budgets that do not fit them.
    """
    points: list[Point] = []
    averages = [spec for spec in specs if spec.average is not None]
    if len(averages) > 1:
        raise PruningError(
            "an average counts all stages together, so only one of pruning.stages has it; "
            f"{' and '.join(spec.name for spec in averages)} have"
        )
    for spec in specs:
        points += _points_of(spec)
    points.sort(key=lambda point: point.boundary)
    for point, other in pairwise(points):
        if point.boundary == other.boundary:
            raise PruningError(
                f"{point.name} and {other.name} both have boundary {point.boundary}; one boundary has one stage"
            )
    for point in points:
        _check_boundary(point, layers, lowest, why)
    average = None if not averages else averages[0].average
    if average is not None and not 0 < average < math.inf:  # also of no number
        raise PruningError(f"average: {average:g} is no number of visual tokens per layer; it is above 0")
    return Schedule(tuple(points), layers, average)


def _points_of(spec: StageSpec) -> list[Point]:
    stage = build_stage(spec.name, spec.options)
    boundaries = list(stage.boundaries if spec.boundaries is None else spec.boundaries)
    if not boundaries:
        raise PruningError(f"stage {spec.name!r} has no boundaries; set them, such as boundaries: [2]")
    if sorted(set(boundaries)) != boundaries:
        raise PruningError(f"boundaries of stage {spec.name!r} are ascending layers, got {boundaries}")
    if spec.average is not None:
        if spec.keep is not None:
            raise PruningError(f"stage {spec.name!r} has both keep and average; choose one")
        if stage.drops_all:
            raise PruningError(
                f"stage {spec.name!r} leaves no visual token, so an average is met by its boundary alone: of N tokens "
                "and L layers, boundary b has an average of b * N / L; set boundaries"
            )
        return [Point(layer, stage, spec.name, None, step) for step, layer in enumerate(boundaries, start=1)]
    keeps = spec.keep if isinstance(spec.keep, list) else [spec.keep]
    if spec.keep is None:
        keeps = list(stage.keeps)
    elif stage.drops_all:
        raise PruningError(f"stage {spec.name!r} leaves no visual token and has no keep; leave it out")
    if len(keeps) != len(boundaries):
        raise PruningError(
            f"stage {spec.name!r} has {len(boundaries)} boundaries and {len(keeps)} budgets; give keep one for each"
        )
    for keep in keeps:
        _check_keep(keep)  # type: ignore[arg-type] # only a list of None could hold None, and the schema has none
    pairs = zip(boundaries, keeps, strict=True)
    return [Point(layer, stage, spec.name, keep, step) for step, (layer, keep) in enumerate(pairs, start=1)]


def _check_keep(keep: Budget) -> None:
    """Check that a stage's budget reads as one: a pruner's, or 0."""
    if not is_nothing(keep):
        check_budget(keep)


def _check_boundary(point: Point, layers: int, lowest: int, why: str) -> None:
    if lowest <= point.boundary < layers:
        return
    if point.boundary < 1:
        reason = "the cache's length is that of layer 0, which must see the whole sequence"
    elif point.boundary < lowest:
        reason = why
    else:
        reason = f"the model has {layers} layers"
    raise PruningError(
        f"stage {point.name!r} can't have boundary {point.boundary}: {reason}; "
        f"set boundaries between {lowest} and {layers - 1}"
    )
