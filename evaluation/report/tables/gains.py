"""What a recalibration gains over its training-free twin, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from prunetune.evaluation.metrics.metric import interval
from prunetune.evaluation.metrics.significance import (
    MCNEMAR,
    PERMUTATION,
    PERMUTATIONS,
    exchanged,
    holm,
    mcnemar,
    permutation_p,
    right_or_wrong,
)
from prunetune.evaluation.report.tables.numbers import Measured, Numbers, sample_orders
from prunetune.evaluation.report.tables.table import Difference

_COUNTS_AT_ONCE = 500
"""Counts of pairs that are exchanged together: 10,000 of both sides are 80 MB."""


@dataclass(frozen=True)
class Pair:
    """A tuned row and its twin.

    Attributes:
        row: the tuned row's id.
        tuned: places of its arms, one for each training.
        twin: place of the training-free arm.
    """

    row: str
    tuned: tuple[int, ...]
    twin: int


@dataclass
class Gains:
    """Differences of one row to its twin, before the correction of their p."""

    by_column: dict[str, Difference] = field(default_factory=dict)
    relative: Difference | None = None
    pooled: Difference | None = None


def gains(
    pairs: Sequence[Pair],
    columns: Sequence[Measured],
    relative: Numbers | None,
    pooled: Numbers | None,
    dense: Sequence[int | None],
    seed: int,
) -> dict[str, Gains]:
    """Return every tuned row's differences to its twin, by the row's id; p is corrected for all of them together.

    Args:
        pairs: tuned rows and their twins.
        columns: of the table.
        relative: the relative average.
        pooled: the pooled accuracy.
        dense: place of each arm's dense arm (A,).
        seed: of the exchanges.
    """
    found = {pair.row: Gains() for pair in pairs}
    if not pairs:
        return found
    shares = _of_columns(found, pairs, columns, dense, seed)
    # Of one benchmark the averages are its difference once more: tested there, and not twice.
    alone = sum(column.weighed for column in columns) == 1
    for place, pair in enumerate(pairs):
        if relative is not None and _both(relative, pair):
            p = None if alone else permutation_p(_observed(relative, pair), shares[:, place])
            found[pair.row].relative = _difference(relative, pair, p, "" if alone else PERMUTATION)
    if pooled is not None:
        alone = len({column.column.task for column in columns}) == 1
        differences = np.zeros((0, len(pairs))) if alone else _exchanged(pairs, pooled, seed).of(pooled)
        for place, pair in enumerate(pairs):
            p, test = (None, "") if alone else _tested(pooled, pair, differences[:, place])
            found[pair.row].pooled = _difference(pooled, pair, p, test)
    return _corrected(found)


def _of_columns(
    found: dict[str, Gains],
    pairs: Sequence[Pair],
    columns: Sequence[Measured],
    dense: Sequence[int | None],
    seed: int,
) -> np.ndarray:
    """Put the differences of every column, and return those of the relative average of exchanged arms (.., pairs)."""
    weighed = [column for column in columns if column.weighed]
    orders = dict(zip((column.column.key for column in weighed), sample_orders(len(weighed), seed), strict=True))
    # Each benchmark's exchanges as a share of the dense arm, which is exchanged with nobody.
    shares = np.zeros((PERMUTATIONS, len(pairs)))
    by_key: dict[str, np.ndarray] = {}
    for numbers, own in _counted_alike(columns):
        moved = _exchanged(pairs, numbers, seed)
        for column in own:
            key = column.column.key
            by_key[key] = moved.of(column.numbers)
            if column.weighed:
                values = [None if base is None else column.numbers.values[base] for base in dense]
                scale = [100 / value / len(weighed) if value else np.nan for value in (values[p.twin] for p in pairs)]
                shares += by_key[key][orders[key]] * scale
    for column in columns:
        for place, pair in enumerate(pairs):
            if _both(column.numbers, pair):
                key = column.column.key
                p, test = _tested(column.numbers, pair, by_key[key][:, place]) if key in by_key else (None, "")
                found[pair.row].by_column[key] = _difference(column.numbers, pair, p, test)
    return shares


@dataclass(frozen=True)
class _Moved:
    """Counts of exchanged arms, for the pairs of which each training is one."""

    pairs: Sequence[Pair]
    counts: list[np.ndarray]

    def of(self, numbers: Numbers) -> np.ndarray:
        """Return the difference of a metric (PERMUTATIONS, rows), the mean over a row's trainings."""
        assert numbers.metric is not None  # it has tallies
        with np.errstate(divide="ignore", invalid="ignore"):
            sides = np.concatenate([numbers.metric.value(counts) for counts in self.counts], axis=1)
        differences = sides[..., 0] - sides[..., 1]
        found, start = [], 0
        for pair in self.pairs:
            found.append(differences[:, start : start + len(pair.tuned)].mean(axis=1))
            start += len(pair.tuned)
        return np.stack(found, axis=1)


def _exchanged(pairs: Sequence[Pair], numbers: Numbers, seed: int) -> _Moved:
    both = [(numbers.tallies[tuned], numbers.tallies[pair.twin]) for pair in pairs for tuned in pair.tuned]
    size = max(1, _COUNTS_AT_ONCE // numbers.tallies[0].counts.shape[1])
    return _Moved(pairs, [exchanged(both[start : start + size], seed) for start in range(0, len(both), size)])


def _counted_alike(columns: Sequence[Measured]) -> list[tuple[Numbers, list[Measured]]]:
    """Return the columns that were computed from the same tallies, together."""
    groups: dict[int, tuple[Numbers, list[Measured]]] = {}
    for column in columns:
        if column.numbers.tallies:
            groups.setdefault(id(column.numbers.tallies), (column.numbers, []))[1].append(column)
    return list(groups.values())


def _tested(numbers: Numbers, pair: Pair, differences: np.ndarray) -> tuple[float, str]:
    """Return p that nothing differs, and the test's name."""
    if len(pair.tuned) == 1:
        assert numbers.metric is not None  # it has tallies
        right = right_or_wrong(numbers.metric, [numbers.tallies[arm] for arm in (*pair.tuned, pair.twin)])
        if right is not None:
            return mcnemar(*right), MCNEMAR
    return permutation_p(_observed(numbers, pair), differences), PERMUTATION


def _both(numbers: Numbers, pair: Pair) -> bool:
    return all(numbers.values[arm] is not None for arm in (*pair.tuned, pair.twin))


def _observed(numbers: Numbers, pair: Pair) -> float:
    twin = numbers.values[pair.twin] or 0.0
    return float(np.mean([(numbers.values[arm] or 0.0) - twin for arm in pair.tuned]))


def _difference(numbers: Numbers, pair: Pair, p: float | None, test: str) -> Difference:
    limits = None
    if numbers.draws is not None:
        limits = interval(numbers.draws[:, list(pair.tuned)].mean(axis=1) - numbers.draws[:, pair.twin])
    return Difference(value=_observed(numbers, pair), interval=limits, p=p, test=test)


def _corrected(found: dict[str, Gains]) -> dict[str, Gains]:
    """Return the gains with p after Holm's correction over all that have one."""
    tested = [one.p for gain in found.values() for one in _all(gain) if one.p is not None]
    adjusted = iter(holm(tested))

    def with_p(one: Difference) -> Difference:
        return one if one.p is None else one.model_copy(update={"adjusted": next(adjusted)})

    corrected = {}
    for row, gain in found.items():  # in the order of _all
        columns = {key: with_p(one) for key, one in gain.by_column.items()}
        relative = None if gain.relative is None else with_p(gain.relative)
        pooled = None if gain.pooled is None else with_p(gain.pooled)
        corrected[row] = Gains(columns, relative, pooled)
    return corrected


def _all(gain: Gains) -> list[Difference]:
    rest = [one for one in (gain.relative, gain.pooled) if one is not None]
    return [*gain.by_column.values(), *rest]
