"""What `prunetune table` writes of filled cells: whose rows stand there, and that `prunetune verify` makes it again."""

from test_tables import table

from prunetune.scripts.tables.cells import lay_out
from prunetune.scripts.tables.report import _whole_rows


def test_a_baseline_that_failed_is_told(tmp_path):
    plan = lay_out(table(tmp_path, hard=16))
    rows, notes = _whole_rows(plan, {"tiny/downsample_hard/tiny_world": "out of memory"})
    assert len(rows) == 3  # nothing else is left out
    assert notes == ["No hard part of tiny: tiny/downsample_hard/tiny_world failed (out of memory)."]
    assert _whole_rows(plan, {}) == (rows, [])
