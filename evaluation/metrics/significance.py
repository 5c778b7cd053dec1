"""Tests that nothing differs between two arms that answered the same questions, and the correction of many of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import numpy as np

from prunetune.evaluation.metrics.intervals import DRAWS_AT_ONCE
from prunetune.evaluation.metrics.metric import Metric, Tally

PERMUTATIONS = 10_000
MCNEMAR = "McNemar, exact"
PERMUTATION = "paired permutation"


def mcnemar(one: np.ndarray, other: np.ndarray) -> float:
    """Return the two-sided p of McNemar's exact test: how the questions split that exactly one of both answers.

    Args:
        one: 0 or 1 for each question (M,). Questions must be independent: no two of one image.
        other: of the other arm, the same questions.
    """
    gained, lost = int(np.sum(one > other)), int(np.sum(one < other))
    number, fewer = gained + lost, min(gained, lost)
    # Whole numbers of any size: 2 ** -number is no float from 1,075 on. Each binomial coefficient is made of the last.
    term = tail = 1
    for place in range(fewer):
        term = term * (number - place) // (place + 1)
        tail += term
    return min(1.0, 2 * tail / 2**number)


def right_or_wrong(metric: Metric, tallies: Sequence[Tally]) -> list[np.ndarray] | None:
    """Return whether each unit is right (U,), by arm; None where units are more than that.

    Only where a unit has one outcome and the metric is the share of right units does McNemar's test have what it asks
    for: independent questions. Where an image holds several, these hang together, and the permutation test, which
    exchanges whole units, stands for it.

    Args:
        metric: in percent.
        tallies: of the arms.
    """
    found = []
    for tally in tallies:
        with np.errstate(divide="ignore", invalid="ignore"):
            alone = metric.value(tally.counts) / 100
            whole = float(metric.value(tally.counts.sum(axis=0))) / 100
        if not np.isin(alone, (0, 1)).all() or not abs(whole - alone.mean()) < 1e-9:
            return None
        found.append(alone)
    return found


def exchanged(pairs: Sequence[tuple[Tally, Tally]], seed: int = 0) -> np.ndarray:
    """Return the counts of pairs of arms whose answers were exchanged by chance (PERMUTATIONS, pairs, 2, P).

    Where nothing differs, an arm's answers to an image might as well be the other's: each unit's counts change sides
    or stay, by the toss of a coin, whole units since questions of one image hang together. The tosses are the same for
    all pairs.
    """
    units = len(pairs[0][0].units)
    differences = np.stack([one.counts - other.counts for one, other in pairs], axis=1)  # (U, pairs, P)
    flat = differences.reshape(units, -1)
    moved = np.empty((PERMUTATIONS, flat.shape[1]))
    random = np.random.default_rng(seed)
    rows = max(1, DRAWS_AT_ONCE // units)  # in pieces of 80 MB, see bootstrap_interval
    for start in range(0, PERMUTATIONS, rows):
        number = min(rows, PERMUTATIONS - start)
        tosses = random.integers(2, size=(number, units), dtype=np.int8)
        moved[start : start + number] = tosses.astype(float) @ flat
    moved = moved.reshape(PERMUTATIONS, *differences.shape[1:])
    totals = np.stack([[one.counts.sum(axis=0), other.counts.sum(axis=0)] for one, other in pairs])  # (pairs, 2, P)
    return np.stack([totals[:, 0] - moved, totals[:, 1] + moved], axis=2)


def permutation_p(observed: float, permuted: np.ndarray) -> float:
    """Return the two-sided p of a difference among those of exchanged arms (PERMUTATIONS,).

    The observed one is an exchange as well, so p is at least 1 / (PERMUTATIONS + 1). An exchange for which the metric
    is not defined counts as if it were at least as large: p is never too small for it.
    """
    size = np.abs(permuted)
    # Sums in another order differ in their last digits, and equal differences must count as equal.
    as_large = ~(size < abs(observed) - 1e-9 * max(1.0, abs(observed)))
    return float((1 + as_large.sum()) / (1 + len(permuted)))


def holm(values: Sequence[float]) -> list[float]:
    """Return p values after Holm's correction (M,): each is below 5 % with 5 % error over all of them together."""
    assert all(isfinite(value) for value in values)
    order = sorted(range(len(values)), key=lambda place: values[place])
    adjusted = [0.0] * len(values)
    largest = 0.0
    for rank, place in enumerate(order):
        # The smallest is weighed against all, the next against all but one; none ends up below a smaller one.
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted
