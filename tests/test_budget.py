"""What a budget may say, and what it means."""

import pytest

from prunetune.pruning import PruningError
from prunetune.pruning.budget import BudgetRule, resolve_budget


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


@pytest.mark.parametrize("unit", ["frame", "clip", "second"])
@pytest.mark.parametrize("keep", [5, 9, "30%", 0.5, "100%"])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_what_frames_of_a_video_keep_adds_up_to_the_videos_budget(unit, keep, frames):
    rule = BudgetRule(keep, unit=unit, seconds=[frames * 0.7])
    shared = rule.of_frames(0, frames, 20)
    assert sum(shared) == rule.of_clip(0, frames, 20) and max(shared) - min(shared) <= 1 and min(shared) >= 1
