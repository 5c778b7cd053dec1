"""Confidence intervals."""

from __future__ import annotations

import numpy as np

RESAMPLES = 10_000
DRAWS_AT_ONCE = 10_000_000


def bootstrap_interval(values: np.ndarray, clusters: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of ``values`` (M,) in percent, by resampling clusters (M,)."""
    _, owner = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(owner, weights=values), np.bincount(owner)
    random, rows = np.random.default_rng(seed), max(1, DRAWS_AT_ONCE // len(sums))
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, rows):  # in pieces: benchmarks have tens of thousands of pictures
        draws = random.integers(len(sums), size=(min(rows, RESAMPLES - start), len(sums)))
        means[start : start + rows] = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.percentile(100 * means, [2.5, 97.5])
    return float(low), float(high)
