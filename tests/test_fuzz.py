"""Good files with a few bytes or values changed at random: every command answers in words, whatever it reads."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import bad_inputs
import fuzzing

CASES = 18  # of each kind; benchmarks/reliability.py --fuzz 2000 runs more


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return bad_inputs.World(tmp_path_factory.mktemp("fuzz") / "world")


@pytest.mark.parametrize("kind", bad_inputs.KINDS, ids=lambda kind: kind.name)
def test_a_changed_file_is_fine_or_answered_in_words(world, tmp_path, kind):
    for seed in range(CASES):
        outcome = fuzzing.fuzz_one(world, kind, tmp_path / str(seed), 1_000_000 + seed)
        assert outcome.verdict != "TRACEBACK", f"seed {1_000_000 + seed}: {outcome.text}"
