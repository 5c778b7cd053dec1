"""Results and manifests: what an earlier version wrote is read to the byte, or refused with the field that is wrong."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from prunetune.evaluation.records import Result, read_manifest, read_results, write_manifest, write_results
from prunetune.evaluation.report.arms import read_arm
from prunetune.evaluation.report.compare import compare
from prunetune.evaluation.run.shards import start
from prunetune.evaluation.tasks import TaskError

# Written by the version before the records were typed: the tiny VLM with divprune at 16 tokens, on eight questions.
EARLIER = ROOT / "tests" / "data" / "arm_format_1"


@pytest.fixture
def arm(tmp_path):
    shutil.copytree(EARLIER, tmp_path / "arm")
    return tmp_path / "arm"


def test_an_earlier_arm_is_read_and_written_to_the_byte(arm):
    rows, manifest = read_results(arm), read_manifest(arm)
    assert len(rows) == 8 and isinstance(rows[0], Result) and rows[0].task == "tiny_world_validation"
    assert manifest.pruning.pruner == "divprune" and manifest.model.dtype == "float32"
    assert manifest.metrics["tiny_world_validation"].interval_95[0] <= 100
    write_results(arm, rows)
    write_manifest(arm, manifest)
    for name in ("results.jsonl", "manifest.json"):
        assert (arm / name).read_bytes() == (EARLIER / name).read_bytes()


def test_an_earlier_arm_is_compared(arm):
    (row,) = compare([arm]).rows
    stored = json.loads((arm / "manifest.json").read_text())["metrics"]["tiny_world_validation"]
    assert row.label == "divprune" and row.kept == 16
    value = row.values["tiny_world_validation/accuracy"]
    assert value.value == stored["accuracy"] and list(value.interval) == stored["interval_95"]
    assert row.pooled == value
    assert read_arm(arm).ids[0].startswith("tiny_world_validation/")


def changed(arm, **fields):
    path = arm / "manifest.json"
    values = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in values.items() if value != "left out"}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"format": 3},
            r"manifest.json has format 3, this version reads 1 and 2; evaluate the arm again into",
        ),
        ({"format": 2}, r"manifest.json can't be trusted: its seal is missing; evaluate the arm again"),
        ({"format": "left out"}, "has format None, this version reads 1"),
        ({"frozen_hash": "left out"}, "manifest.json: the field frozen_hash is missing; another version wrote it"),
        ({"seed": 3}, "manifest.json: the field seed is unknown; another version wrote it, evaluate the arm again"),
        ({"batch_size": "8"}, "the field batch_size is '8': Input should be a valid integer"),
        ({"projector": {"adapter": None}}, "projector.hash is missing; the field projector.tuned_for is missing"),
        ({"kept_tokens": "left out"}, "it says complete, and has no metrics or no kept_tokens"),
        ({"complete": False}, "is not finished; run the same prunetune evaluate again"),
    ],
)
def test_a_manifest_that_can_not_be_trusted_is_refused_in_one_line(arm, fields, message):
    changed(arm, **fields)
    with pytest.raises(TaskError, match=message) as refused:
        compare([arm])
    assert "\n" not in str(refused.value)


def test_an_arm_is_not_gone_on_with_in_a_folder_of_another_format(arm):
    manifest = read_manifest(arm)
    start(arm, manifest)  # the same arm: its rows are still there
    assert len(read_results(arm)) == 8
    changed(arm, format=3)
    with pytest.raises(TaskError, match="has format 3, this version reads 1 and 2"):
        start(arm, manifest)


def test_broken_files_and_rows_are_refused_by_name_and_line(arm):
    lines = (arm / "results.jsonl").read_text().splitlines()
    row = json.loads(lines[2])
    for broken, message in (
        ({**row, "extra": 1}, r"results.jsonl, line 3: the field extra is unknown"),
        ({name: value for name, value in row.items() if name != "kept"}, r"line 3: the field kept is missing"),
        ({**row, "score": "1"}, r"line 3: the field score is '1'"),
    ):
        (arm / "results.jsonl").write_text("\n".join([*lines[:2], json.dumps(broken), *lines[3:]]) + "\n")
        with pytest.raises(TaskError, match=message):
            compare([arm])
    (arm / "results.jsonl").write_text("\n".join([*lines[:2], lines[2][:30]]) + "\n")
    with pytest.raises(TaskError, match="line 3 is not valid JSON"):
        compare([arm])
    (arm / "manifest.json").write_text("{")
    with pytest.raises(TaskError, match=r"manifest.json is not valid JSON"):
        compare([arm])
    (arm / "manifest.json").write_text("[]")
    with pytest.raises(TaskError, match=r"manifest.json is no manifest: it holds list"):
        compare([arm])


@pytest.mark.parametrize("command", ["compare", "score", "list"])
def test_commands_that_read_results_load_no_model_library(command, tmp_path):
    """The whole command, as it is typed: waiting for torch would take longer than everything it does."""
    arguments = {
        "compare": ["compare", str(EARLIER), "--output", str(tmp_path / "table")],
        "score": ["score", "tiny_world_validation", "--predictions", str(EARLIER / "results.jsonl"), "--data", "."],
        "list": ["list", "tasks"],
    }[command]
    code = (
        "import sys; from prunetune.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code)\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    expected = {"compare": "| divprune |", "score": "has no prediction for 2392 of 2400 questions", "list": "mmvet"}
    assert expected[command] in done.stdout and done.stdout.splitlines()[-1] == "[]"
