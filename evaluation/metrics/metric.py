"""A benchmark's native metric as a function of counts per unit, so that its interval is that of the very metric."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from prunetune.evaluation.metrics.intervals import DRAWS_AT_ONCE, RESAMPLES

if TYPE_CHECKING:
    from prunetune.evaluation.tasks.base import Scored

Value = Callable[[np.ndarray], np.ndarray]
"""A metric of counts: (..., P) -> (...). NaN where it is not defined, such as an F1 without a positive."""


@dataclass(frozen=True)
class Tally:
    """What a metric needs to know of some answers, by unit.

    Attributes:
        units: what is drawn as a whole (U,), sorted: images, circular groups, MME's pairs of questions.
        counts: added up over the units that are drawn (U, P).
    """

    units: tuple[str, ...]
    counts: np.ndarray


@dataclass(frozen=True)
class Metric:
    """One number that a benchmark is known by.

    Attributes:
        name: "accuracy", "f1", "perception"; the column's name, together with the benchmark's.
        unit: "%" of 100, "points" of a sum, "score" otherwise.
        about: one line: what it is, and what its unit of drawing is.
        tally: counts of scored predictions, by unit.
        value: the metric of counts.
        higher: whether more is better.
    """

    name: str
    unit: Literal["%", "points", "score"]
    about: str
    tally: Callable[[Sequence[Scored]], Tally]
    value: Value
    higher: bool = True

    def of(self, scored: Sequence[Scored]) -> float | None:
        """Return the metric of scored predictions; None where it is not defined."""
        return self.of_counts(self.tally(scored).counts.sum(axis=0))

    def of_counts(self, counts: np.ndarray) -> float | None:
        """Return the metric of counts (P,); None where it is not defined."""
        value = float(self.value(np.asarray(counts, dtype=float)))
        return value if np.isfinite(value) else None


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole; NaN where the whole is nothing, which is a metric that is not defined."""
    part, whole = np.broadcast_arrays(np.asarray(part, dtype=float), np.asarray(whole, dtype=float))
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole != 0)


def mean_of_groups(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Return the mean of values (..., G) over the groups that are there (..., G); NaN where none is."""
    return share(np.where(there, values, 0.0).sum(axis=-1), there.sum(axis=-1))


def tallied(units: Sequence[Hashable], rows: Sequence[Sequence[float]]) -> Tally:
    """Return rows of counts (M, P) added up by unit (M,)."""
    names, owner = np.unique(np.asarray([str(unit) for unit in units]), return_inverse=True)
    counts = np.zeros((len(names), len(rows[0])))
    # One after another in the order of the questions, so that sums do not depend on how NumPy pairs them.
    np.add.at(counts, owner, np.asarray(rows, dtype=float))
    return Tally(tuple(names.tolist()), counts)


def resampled(tallies: Sequence[Tally], seed: int = 0) -> np.ndarray:
    """Return the counts of bootstrap samples of units, the same samples for all arms (RESAMPLES, A, P).

    Pairs of arms are drawn together, so that the difference of two of their values is a paired one.

    Args:
        tallies: one for each arm (A,), of the same units.
        seed: of the draws.
    """
    units = tallies[0].units
    assert all(tally.units == units for tally in tallies)  # arms of one table have the same questions
    counts = np.stack([tally.counts for tally in tallies], axis=1)  # (U, A, P)
    flat = counts.reshape(len(units), -1)
    found = np.empty((RESAMPLES, flat.shape[1]))
    random = np.random.default_rng(seed)
    # In pieces of 10 million draws (80 MB), see bootstrap_interval, whose draws these are.
    rows = max(1, DRAWS_AT_ONCE // len(units))
    for start in range(0, RESAMPLES, rows):
        number = min(rows, RESAMPLES - start)
        draws = random.integers(len(units), size=(number, len(units)))
        # How often each unit is drawn, (number, U): one product then serves all arms and counts.
        draws += len(units) * np.arange(number)[:, None]
        times = np.bincount(draws.ravel(), minlength=number * len(units)).reshape(number, len(units))
        found[start : start + number] = times.astype(float) @ flat
    return found.reshape(RESAMPLES, *counts.shape[1:])


def intervals(metrics: Sequence[Metric], scored: Sequence[Scored]) -> dict[str, list[float] | None]:
    """Return the 95 % interval of every metric of some answers by its name; None where it has none."""
    found: dict[str, list[float] | None] = {}
    drawn: dict[Callable[..., Tally], np.ndarray] = {}
    for metric in metrics:
        if metric.tally not in drawn:  # most metrics of a benchmark count the same
            drawn[metric.tally] = resampled([metric.tally(scored)])[:, 0]
        limits = interval(metric.value(drawn[metric.tally]))
        found[metric.name] = None if limits is None else list(limits)
    return found


def interval(values: np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of resampled values (RESAMPLES,); None where some are not defined."""
    if not np.isfinite(values).all():
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
