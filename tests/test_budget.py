"""What a budget may say, and what it means."""

import pytest

from prunetune.pruning import PruningError
from prunetune.pruning.budget import resolve_budget


@pytest.mark.parametrize(
    ("keep", "count", "wanted"),
    [
        (64, 576, 64),
        (0.111, 576, 64),
        ("50%", 144, 72),
        ("11.1%", 576, 64),
        (1.0, 9, 9),
        (1, 9, 1),
        (0.5, 5, 2),
        ("100%", 7, 7),
    ],
)
def test_budgets(keep, count, wanted):
    assert resolve_budget(keep, count) == wanted


@pytest.mark.parametrize("keep", [0, -3, 577, 0.0, 1.5, -0.1, "0%", "101%", "64", "many%", 0.0001, True, None])
def test_budgets_out_of_range_say_so(keep):
    with pytest.raises(PruningError, match=r"keep="):
        resolve_budget(keep, 576)
