"""The one place where scores are averaged: overall, and for every source of questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Average:
    """Mean scores in percent.

    Attributes:
        overall: of all questions; None where none has a score.
        by_source: of every source that has a score, by name.
    """

    overall: float | None
    by_source: dict[str, float]


def average(scores: Sequence[float | None], sources: Sequence[str]) -> Average:
    """Return the mean of some scores, from 0 to 1, as percent.

    Args:
        scores: one per question (M,); a question whose score is None, such as one with a hidden answer, counts nowhere.
        sources: where each question comes from (M,).
    """
    every: list[float] = []
    by_source: dict[str, list[float]] = {}
    for score, source in zip(scores, sources, strict=True):
        # Not 0: a hidden answer is not a wrong one.
        if score is None:
            continue
        every.append(score)
        by_source.setdefault(source, []).append(score)
    means = {}
    # By name, not as they come: two arms then list their sources alike, whatever order their files had.
    for source in sorted(by_source):
        means[source] = _percent(by_source[source])
    return Average(_percent(every) if every else None, means)


def _percent(scores: list[float]) -> float:
    # A plain sum in the order of the questions. NumPy's adds in pairs, which moves the last digit, and manifests that
    # are already written would no longer equal what is computed from their rows.
    return 100 * sum(scores) / len(scores)
