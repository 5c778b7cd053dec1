"""The page of families is made from what passed, also by several workers, and names every family there is."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from prunetune.pruning import registered_families
from prunetune.scripts.families import page

SUITE = """
import pytest

class TestFamily:
    in_report = True

    @pytest.fixture(autouse=True)
    def _say(self, record_property):
        record_property("family", "tiny")
        record_property("modality", "image")
        record_property("methods", 7)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_keep_all_is_bit_identical_to_stock(self, dtype):
        assert dtype == "float32"

    def test_something_new(self):
        pass

    def test_left_out(self):
        pytest.skip("not here")

def test_another():
    raise RuntimeError("is no test of the suite")
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_is_written_down_and_becomes_a_table(tmp_path, workers):
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]")
    line = [sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "prunetune.testing.report", "--families-report",
            "out/report.json", "test_suite.py"]  # fmt: skip
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert "1 failed, 2 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    head, _, row = [line for line in page(json.loads((tmp_path / "out" / "report.json").read_text())).splitlines()
                    if line.startswith("|")][:3]  # fmt: skip
    cells = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert cells["family"] == "tiny" and cells["modality"] == "image" and cells["methods"] == "7"
    assert (cells["stock, float32"], cells["stock, bfloat16"], cells["something new"]) == ("yes", "failed", "yes")
    assert cells["hidden"] == cells["left out"] == "-"


def test_every_family_is_in_the_page():
    table = (ROOT / "docs" / "families.md").read_text()
    missing = [name for name in [*registered_families(), "generic"] if f"\n| {name} | " not in table]
    assert not missing, "run `make families`"


def test_models_of_a_row_pass_together():
    record = {"family": "a", "modality": "video", "check": "generating_equals_step_by_step", "of": ""}
    records = [{**record, "methods": 14, "outcome": "passed"}, {**record, "methods": 21, "outcome": "skipped"}]
    (row,) = [line for line in page(records).splitlines() if line.startswith("| a ")]
    assert row.startswith("| a | video | 14 to 21 |") and "yes" not in row
