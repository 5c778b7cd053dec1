"""Means with intervals over training seeds and pictures together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

DRAWS = 4000
QUESTIONS = 8


@dataclass(frozen=True)
class Estimate:
    """A number in points with its 95 % interval; ``seeds`` says how many trainings it is the mean of."""

    value: float
    low: float
    high: float
    seeds: int

    def plain(self) -> str:
        """Return it with its interval."""
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"

    def signed(self) -> str:
        """Return a difference with its interval."""
        return f"{self.value:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def accuracy(right: np.ndarray) -> Estimate:
    """Return the accuracy in percent of S trainings on N pictures, right answers of eight (S, N).

    Seeds and pictures are drawn anew together, each with replacement: the interval holds both. Of three seeds the
    drawing sees 2/3 of their variance, so it is a little narrow where seeds differ more than pictures.
    """
    return _estimate(100 * right.mean() / QUESTIONS, _means(right, 0), len(right))


def difference(first: np.ndarray, second: np.ndarray) -> Estimate:
    """Return how many points the first (S, N) is above the second (S', N), on the same pictures.

    Each draw takes the same pictures for both; seeds are drawn for each, for nothing pairs them.
    """
    value = 100 * (first.mean() - second.mean()) / QUESTIONS
    return _estimate(value, _means(first, 1) - _means(second, 2), min(len(first), len(second)))


def _means(right: np.ndarray, stream: int) -> np.ndarray:
    """Return the accuracy of every draw, (DRAWS,); the pictures drawn are the same whichever the stream is."""
    seeds = np.random.default_rng([1, stream]).multinomial(len(right), np.ones(len(right)) / len(right), DRAWS)
    drawn: np.ndarray = ((seeds / len(right)) @ right * pictures(right.shape[1])).sum(1)
    return 100 * drawn / QUESTIONS


@cache
def pictures(count: int) -> np.ndarray:
    """Return how often each picture is in each draw, as shares, (DRAWS, N)."""
    drawn: np.ndarray = np.random.default_rng(0).multinomial(count, np.ones(count) / count, DRAWS) / count
    return drawn


def _estimate(value: float, draws: np.ndarray, seeds: int) -> Estimate:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high), seeds)
