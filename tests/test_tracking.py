"""What W&B is told of a table, its arms and trainings, read back from offline runs."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from wandb_files import of_kind, records

from prunetune.configs import EvaluateConfig, TableConfig, TrackingConfig
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.records import read_manifest
from prunetune.evaluation.report.tables.layouts.examples import Answered, Picture
from prunetune.models import Arm
from prunetune.pruning import PruningSpec
from prunetune.scripts.tables.cells import lay_out
from prunetune.scripts.tables.make import make_table
from prunetune.scripts.tables.report import overlaid
from prunetune.scripts.tracked import tracked_evaluate
from prunetune.train.tracking import Tracker


def config_of(folder) -> dict:
    """The W&B run's configuration as it ended."""
    found = {}
    for run in of_kind(folder, "run"):
        found |= {entry.key: json.loads(entry.value_json) for entry in run.config.update}
    for update in of_kind(folder, "config"):
        found |= {entry.key: json.loads(entry.value_json) for entry in update.update}
    return found


def test_a_recalibration_keeps_its_adapter_and_its_hashes(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "prunetune.json").write_text("{}")
    tracking = TrackingConfig(wandb="offline", group="my table", job_type="recalibrate", tags=["tuned", "16"], name="x")
    tracker = Tracker(tracking, tmp_path, {"pruning": {"keep": 16}})
    tracker.log({"held_out_loss": 0.5}, step=1)
    tracker.note({"hashes": {"projector_hash": "abc"}})
    tracker.log_adapter(adapter, {"projector_hash": "abc"})
    tracker.close()
    (run,) = of_kind(tmp_path, "run")
    assert (run.run_group, run.job_type, list(run.tags), run.display_name) == (
        "my table", "recalibrate", ["tuned", "16"], "x")  # fmt: skip
    found = config_of(tmp_path)
    assert found["pruning"] == {"keep": 16} and found["hashes"] == {"projector_hash": "abc"}
    (artifact,) = of_kind(tmp_path, "artifact")
    assert artifact.type == "adapter" and json.loads(artifact.metadata) == {"projector_hash": "abc"}
    assert [entry.path for entry in artifact.manifest.contents] == ["prunetune.json"]
    history = [json.loads(item.value_json) for row in of_kind(tmp_path, "history") for item in row.item
               if (item.key or list(item.nested_key)) == ["held_out_loss"]]  # fmt: skip
    assert history == [0.5]


def test_adapters_can_be_kept_out(tmp_path):
    (tmp_path / "adapter").mkdir()
    tracker = Tracker(TrackingConfig(wandb="offline", adapters=False), tmp_path, {})
    tracker.log_adapter(tmp_path / "adapter", {})
    tracker.close()
    assert of_kind(tmp_path, "artifact") == []


def test_a_run_that_failed_is_no_others(tmp_path):
    """An arm that breaks leaves its W&B run closed: the next one is a run of its own."""
    config = EvaluateConfig.model_validate({
        "model": {"path": "assets/tiny_vlm", "dtype": "float32"}, "tasks": ["tiny_world"], "limit": 4,
        "tracking": {"wandb": "offline"}, "output": str(tmp_path / "broken")})  # fmt: skip
    with pytest.raises(TaskError, match="not the one its configuration names"):
        tracked_evaluate(config, Arm.load(config.model, PruningSpec("fastervlm", 16)))
    after = Tracker(TrackingConfig(wandb="offline", name="after"), tmp_path / "after", {"own": 1})
    assert after.run_id != (tmp_path / "broken" / "wandb_id.txt").read_text()
    after.close()
    assert config_of(tmp_path / "after")["own"] == 1


def test_pictures_are_dark_where_an_arm_dropped_them():
    pixels = np.full((8, 8, 3), 200, dtype=np.uint8)
    answered = Answered(prediction="", score=1, kept=[1], grid=(2, 2))
    drawn = np.asarray(Image.open(io.BytesIO(overlaid(Picture.of(pixels), answered))))
    assert (drawn[:4, 4:] == 200).all() and (drawn[4:] == 40).all() and (drawn[:4, :4] == 40).all()


def test_a_table_is_one_group_of_runs(tmp_path):
    values = {
        "title": "Mine", "models": [{"name": "tiny", "model": {"path": "assets/tiny_vlm", "dtype": "float32"}}],
        "methods": ["fastervlm"], "budgets": [16], "tasks": ["tiny_world"], "limit": 16, "batch_size": 8,
        "max_new_tokens": 4, "examples": 2, "layouts": ["json", "html"], "output": str(tmp_path / "mine"),
        "tracking": {"wandb": "offline"},
    }  # fmt: skip
    config = TableConfig.model_validate(values)
    assert make_table(config).failed == {}
    for cell in lay_out(config).cells:
        (run,) = of_kind(cell.folder, "run")
        assert (run.run_group, run.job_type, run.display_name) == ("mine", "evaluate", cell.name)
        hashes = config_of(cell.folder)["hashes"]
        assert hashes["results"] == read_manifest(cell.folder).results_hash
    (run,) = of_kind(tmp_path / "mine", "run")
    assert (run.run_group, run.job_type) == ("mine", "table")
    keys = {(list(item.nested_key) or [item.key])[0] for row in of_kind(tmp_path / "mine", "history")
            for item in row.item}  # fmt: skip
    assert {"table", "plot", "report", "examples"} <= keys
    assert {record.WhichOneof("record_type") for record in records(tmp_path / "mine")} >= {"artifact", "history"}
