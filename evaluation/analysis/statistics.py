"""Numbers with intervals: correlations, means, concentration of a distribution, and overlap by chance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import comb

import numpy as np

from prunetune.evaluation.metrics.intervals import DRAWS_AT_ONCE, RESAMPLES, bootstrap_interval
from prunetune.evaluation.metrics.metric import interval


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its 95 % bootstrap interval; the ends are None where there is none."""

    value: float
    low: float | None
    high: float | None


def mean_of(values: np.ndarray, seed: int = 0) -> Estimate:
    """Return the mean of values (n,), of independent images, with its percentile interval."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return Estimate(float(values.mean()), None, None)
    low, high = bootstrap_interval(values, np.arange(len(values)), seed)  # in percent of the values
    return Estimate(float(values.mean()), low / 100, high / 100)


def pearson(one: np.ndarray, other: np.ndarray, seed: int = 0) -> Estimate | None:
    """Return Pearson's correlation of two measures (n,) of the same images.

    None of fewer than three, and of constants: equal images differ in the last digits from batch to batch.
    """
    return _correlated(one, other, lambda values, times: np.broadcast_to(values, times.shape), seed)


def spearman(one: np.ndarray, other: np.ndarray, seed: int = 0) -> Estimate | None:
    """Return Spearman's correlation, ranks anew in each resample; ties share their mean rank."""
    return _correlated(one, other, ranks, seed)


def ranks(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return the mean ranks (R, n) of values (n,) of which each is there so many times (R, n).

    Of the values ``[3, 1, 3]``, each there once, the ranks are ``[2.5, 1, 2.5]``.
    """
    distinct, which = np.unique(values, return_inverse=True)
    there = np.zeros((len(times), len(distinct)))
    np.add.at(there.T, which, times.T)
    last = there.cumsum(axis=1)
    return (last - (there - 1) / 2)[:, which]


Prepared = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _correlated(one: np.ndarray, other: np.ndarray, prepared: Prepared, seed: int) -> Estimate | None:
    one, other = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    if len(one) < 3 or _constant(one) or _constant(other):
        return None
    whole = np.ones((1, len(one)))
    value = float(_weighted(prepared(one, whole), prepared(other, whole), whole)[0])
    found = []
    for times in _draws(len(one), seed):
        found.append(_weighted(prepared(one, times), prepared(other, times), times))
    drawn = np.concatenate(found)
    # Of few images a resample may be one image alone, of which nothing correlates.
    ends = interval(drawn[np.isfinite(drawn)])
    return Estimate(value, *(ends or (None, None)))


def _constant(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= 1e-6 * np.abs(values).max())


def _draws(count: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each image is drawn (R, n), RESAMPLES rows in all, in pieces of 80 MB."""
    random = np.random.default_rng(seed)
    rows = max(1, DRAWS_AT_ONCE // count)
    for start in range(0, RESAMPLES, rows):
        number = min(rows, RESAMPLES - start)
        drawn = random.integers(count, size=(number, count)) + count * np.arange(number)[:, None]
        yield np.bincount(drawn.ravel(), minlength=number * count).reshape(number, count).astype(float)


def _weighted(one: np.ndarray, other: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the correlation (R,) of two measures (R, n) with weights (R, n); NaN where one is constant."""
    total = weights.sum(axis=1, keepdims=True)
    one = one - (one * weights).sum(axis=1, keepdims=True) / total
    other = other - (other * weights).sum(axis=1, keepdims=True) / total
    product = (weights * one * other).sum(axis=1)
    size = np.sqrt((weights * one**2).sum(axis=1) * (weights * other**2).sum(axis=1))
    return np.divide(product, size, out=np.full(len(product), np.nan), where=size > 0)


def gini(shares: np.ndarray) -> float:
    """Return the Gini coefficient of non-negative shares (N,): 0 of equal ones, (N - 1) / N if one has everything."""
    ordered = np.sort(np.asarray(shares, dtype=float))
    count = len(ordered)
    places = np.arange(1, count + 1)
    return float((2 * places - count - 1) @ ordered / (count * ordered.sum()))


def top_mass(shares: np.ndarray, count: int) -> float:
    """Return what the ``count`` largest of some shares (N,) add up to: the most that so many tokens can hold."""
    return float(np.sort(np.asarray(shares, dtype=float))[::-1][:count].sum())


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Return how many of the tokens that either keeps (N,) both keep; 1 where neither keeps any."""
    either = int((one | other).sum())
    return int((one & other).sum()) / either if either else 1.0


@lru_cache(maxsize=4096)
def chance_jaccard(tokens: int, one: int, other: int) -> float:
    """Return the mean Jaccard of two choices made blindly, of so many tokens each: exactly, over all overlaps."""
    if one + other == 0:
        return 1.0
    total = comb(tokens, other)
    expected = 0.0
    for both in range(max(0, one + other - tokens), min(one, other) + 1):
        ways = comb(one, both) * comb(tokens - one, other - both)
        expected += ways / total * both / (one + other - both)
    return expected


def corrected(overlap: float, chance: float) -> float | None:
    """Return an overlap on the scale where chance is 0 and sameness 1; None where chance alone gives sameness."""
    return (overlap - chance) / (1 - chance) if chance < 1 else None
