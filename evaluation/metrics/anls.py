"""ANLS, the metric of DocVQA and InfographicVQA: how much of an answer is right, letter by letter."""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLD = 0.5
"""A similarity below this counts as 0: such an answer is another one, and no misreading."""


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Return the similarity to the nearest answer, from 0 to 1; 0 below :data:`THRESHOLD`.

    One letter wrong of four ("1932" for "1982") gives 0.75. Case and repeated spaces do not count.

    Args:
        prediction: raw text.
        answers: any of which is right; not empty.
    """
    nearest = min(_distance(prediction, answer) for answer in answers)
    similarity = 1 - nearest
    return similarity if similarity >= THRESHOLD else 0.0


def edit_distance(first: str, second: str) -> int:
    """Return how many letters have to be put in, taken out or replaced to turn one text into the other."""
    # Row by row of the table of distances between beginnings: only the row above is needed.
    above = list(range(len(second) + 1))
    for number, letter in enumerate(first, start=1):
        row = [number]
        for column, other in enumerate(second, start=1):
            replaced = above[column - 1] + (letter != other)
            row.append(min(replaced, above[column] + 1, row[-1] + 1))
        above = row
    return above[-1]


def _distance(prediction: str, answer: str) -> float:
    # Divided by the length before spaces are joined, as in the published scorer.
    length = max(len(prediction), len(answer))
    return edit_distance(_plain(prediction), _plain(answer)) / length if length else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
