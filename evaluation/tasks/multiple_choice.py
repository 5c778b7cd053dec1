"""What benchmarks of questions with options share: the prompt's lines, and means over groups of questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from prunetune.evaluation.metrics.metric import Metric, Tally, mean_of_groups, share, tallied
from prunetune.evaluation.tasks.base import Scored, unit_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def option_lines(options: Sequence[str]) -> list[str]:
    """Return ``A. FIRST``, ``B. SECOND`` and so on."""
    return [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]


def mean_over_groups(name: str, groups: Sequence[str], group_of: Callable[[Scored], str], about: str) -> Metric:
    """Return the mean over groups of each group's mean score, in percent; groups without a question are left out.

    Args:
        name: of the metric.
        groups: all there are, so that arms and samples of them count alike.
        group_of: the group of a question, one of ``groups``.
        about: one line, see :class:`Metric`.
    """
    column = {group: number for number, group in enumerate(groups)}

    def tally(scored: Sequence[Scored]) -> Tally:
        rows = []
        for one in scored:
            row = [0.0] * (2 * len(groups))  # sums of scores, then numbers of questions
            row[column[group_of(one)]] = one.score or 0.0
            row[len(groups) + column[group_of(one)]] = 1.0
            rows.append(row)
        return tallied([unit_of(one.item) for one in scored], rows)

    def value(counts: np.ndarray) -> np.ndarray:
        sums, numbers = counts[..., : len(groups)], counts[..., len(groups) :]
        return 100 * mean_of_groups(share(sums, numbers), numbers > 0)  # a sample may hold none of a group's

    return Metric(name=name, unit="%", about=about, tally=tally, value=value)
