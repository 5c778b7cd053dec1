"""Tests between two arms, by hand, as fractions, or against every exchange that there is."""

from fractions import Fraction
from itertools import product
from math import comb

import numpy as np
import pytest

from prunetune.evaluation.metrics.metric import Metric, Tally
from prunetune.evaluation.metrics.significance import (
    PERMUTATIONS,
    exchanged,
    holm,
    mcnemar,
    permutation_p,
    right_or_wrong,
)


def tally(counts):
    counts = np.asarray(counts, dtype=float)
    return Tally(tuple(f"{number:05d}" for number in range(len(counts))), counts)


def accuracy(counts):
    return 100 * counts[..., 0] / counts[..., 1]


def f1(counts):
    """Of true positives, false positives and false negatives."""
    return 2 * counts[..., 0] / (2 * counts[..., 0] + counts[..., 1] + counts[..., 2])


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(5, 0, 2 / 32), (0, 0, 1.0), (3, 3, 1.0), (8, 2, 2 * (1 + 10 + 45) / 1024)]
)
def test_mcnemar_by_hand(gained, lost, p):
    one = np.array([1.0] * gained + [0.0] * lost + [1, 0, 1])
    other = np.array([0.0] * gained + [1.0] * lost + [1, 0, 1])
    assert mcnemar(one, other) == mcnemar(other, one) == pytest.approx(p)


def test_mcnemar_equals_the_binomial_tails_as_fractions():
    random = np.random.default_rng(0)
    for number in (10, 300, 6_000):  # the last with far more discordant questions than a float has exponents for
        one, other = (random.random((2, number)) < [[0.53], [0.5]]).astype(float)
        gained, lost = int((one > other).sum()), int((one < other).sum())
        tail = sum(Fraction(comb(gained + lost, count), 2 ** (gained + lost)) for count in range(min(gained, lost) + 1))
        assert mcnemar(one, other) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)


def every_exchange(one, other, value):
    """The two-sided p over all sides that units can be on, written as loops."""
    observed = abs(value(one.sum(0)) - value(other.sum(0)))
    as_large = 0
    for sides in product((False, True), repeat=len(one)):
        sides = np.array(sides)[:, None]
        left, right = np.where(sides, other, one).sum(0), np.where(sides, one, other).sum(0)
        as_large += abs(value(left) - value(right)) >= observed - 1e-9
    return as_large / 2 ** len(one)


@pytest.mark.parametrize("value", [accuracy, f1])
def test_the_permutation_test_equals_every_exchange_of_units(value):
    """For an accuracy with images of several questions, and for an F1, which is no mean of anything."""
    random = np.random.default_rng(1)
    for _ in range(4):
        if value is accuracy:
            asked = random.integers(1, 5, size=11)
            one, other = (
                np.stack([random.binomial(asked, chance), asked], axis=1).astype(float) for chance in (0.7, 0.4)
            )
        else:
            one, other = random.integers(0, 4, size=(2, 11, 3)).astype(float) + 0.0
        found = exchanged([(tally(one), tally(other))])
        assert found.shape == (PERMUTATIONS, 1, 2, one.shape[1])
        differences = value(found[:, 0, 0]) - value(found[:, 0, 1])
        p = permutation_p(value(one.sum(0)) - value(other.sum(0)), differences)
        assert p == pytest.approx(every_exchange(one, other, value), abs=0.02)


def test_the_permutation_test_is_seldom_below_five_percent_where_nothing_differs():
    """With images of eight questions that stand or fall together, where McNemar's test would be far too sure."""
    random = np.random.default_rng(2)
    below = sure = 0
    for _ in range(60):
        one, other = (random.random((2, 50)) < 0.5).astype(float)
        pair = tuple(tally(np.stack([8 * right, np.full(50, 8.0)], axis=1)) for right in (one, other))
        found = accuracy(exchanged([pair]))
        p = permutation_p(100 * (one.mean() - other.mean()), found[:, 0, 0] - found[:, 0, 1])
        below += p < 0.05
        sure += mcnemar(np.repeat(one, 8), np.repeat(other, 8)) < 0.05
    assert below <= 8 < 20 < sure  # 5 % of 60 is 3; more than 8 has probability below 1 %


def test_an_undefined_exchange_never_makes_p_smaller():
    permuted = np.array([0.0, np.nan, np.nan, 1.0])
    assert permutation_p(5.0, permuted) == 3 / 5
    assert permutation_p(0.0, permuted) == 1.0


def test_mcnemar_is_for_units_that_are_right_or_wrong():
    def outcome(counts, value=accuracy):
        metric = Metric("m", "%", "", None, lambda counts: 100 * np.array(value(counts)) / 100)
        found = right_or_wrong(metric, [tally(counts)])
        return None if found is None else found[0].tolist()

    single = [[1, 1], [0, 1], [1, 1], [1, 1]]
    assert outcome(single) == [1, 0, 1, 1]
    assert outcome([[1, 1, 9], [0, 1, 9]]) == [1, 0]  # whatever else is counted, as circular groups do
    assert outcome(single, lambda counts: 100 * counts[..., 0]) is None  # a sum
    assert outcome([[0.3, 1], [1, 1]]) is None  # VQA accuracy
    assert outcome([[1, 2], [1, 1]]) is None  # two questions of one image
    assert outcome([[2, 2], [0, 1]]) is None  # which weighs more than the other
    assert outcome([[0, 0], [1, 1]]) is None  # a unit without a question


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == [] and holm([0.02]) == [0.02]
