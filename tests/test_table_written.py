"""What `prunetune table` writes of filled cells: whose rows stand there, and that `prunetune verify` makes it again."""

import json
import shutil

import pytest
from test_tables import table

from prunetune.evaluation.report.comparison import read_table
from prunetune.scripts.tables.cells import lay_out
from prunetune.scripts.tables.make import make_table
from prunetune.scripts.tables.report import _whole_rows
from prunetune.scripts.verify import verify

QUOTED = (
    "- {arm: theirs, kept: 16, values: {tiny_world/accuracy: 61.9}, cite: 'a paper', model: tiny_vlm, method: divprune}"
)


def test_a_baseline_that_failed_is_told(tmp_path):
    plan = lay_out(table(tmp_path, hard=16))
    rows, notes = _whole_rows(plan, {"tiny/downsample_hard/tiny_world": "out of memory"})
    assert len(rows) == 3  # nothing else is left out
    assert notes == ["No hard part of tiny: tiny/downsample_hard/tiny_world failed (out of memory)."]
    assert _whole_rows(plan, {}) == (rows, [])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A table of one checkpoint in two dtypes, with a hard part, costs, a named method and a quoted row, rescored."""
    place = tmp_path_factory.mktemp("written")
    (place / "quoted.yaml").write_text(QUOTED)
    models = [{"name": f"in {dtype}", "model": {"path": "assets/tiny_vlm", "dtype": dtype}}
              for dtype in ("float32", "bfloat16")]  # fmt: skip
    config = table(place / "out", models=models, methods=[{"pruner": "divprune", "name": "ours"}, "fastervlm"], hard=4,
                   quoted=[str(place / "quoted.yaml")], tasks=["tiny_world", "hard_world"], features=False,
                   title="A table", rescore=True, layouts=["json", "csv", "markdown", "latex"])  # fmt: skip
    assert make_table(config).failed == {}
    return place / "out"


def states(folder):
    return {check.link: check.holds for check in verify(folder)}


def test_rows_have_the_names_of_the_yaml(made):
    found = read_table(made)
    assert [row.label for row in found.rows] == [f"in {dtype}: {method}" for dtype in ("float32", "bfloat16")
                                                 for method in ("dense", "ours", "fastervlm")]  # fmt: skip
    assert all(set(row.hard) == {"tiny_world", "hard_world"} and row.costs for row in found.rows)
    assert found.quoted[0].beside is not None and any(note.startswith("TFLOPs") for note in found.footnotes)
    assert "Scored anew from the predictions with today's scorers; none differs." in found.footnotes
    for file in ("table.md", "table.csv", "table.tex", "table.json", "comparison.json"):
        assert str(made.parent) not in (made / file).read_text()


def test_a_table_is_verified_and_an_edited_number_is_found(made, tmp_path):
    found = states(made)
    assert found["numbers"] is True and False not in found.values()
    assert found["arm arms/in-float32/dense/tiny_world"] and found["arm arms/in-bfloat16/downsample_hard/hard_world"]
    moved = tmp_path / "moved"
    shutil.copytree(made, moved)
    assert states(moved)["numbers"] is True  # without the file of the quoted rows, which are left out
    edited = json.loads((moved / "table.json").read_text())
    edited["rows"][1]["hard"]["tiny_world"]["value"] += 1
    (moved / "table.json").write_text(json.dumps(edited))
    found = states(moved)
    assert found["numbers"] is False and found["table.json"] is False and found["table.md"] is True
