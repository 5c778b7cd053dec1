"""A launched recalibration in float8 with a held-out loss, and the same one gone on with after a kill."""

import json
import math

import pytest
import torch
from conftest import TINY_VLM
from launches import arguments, run
from safetensors.torch import load_file
from test_recalibrate_mixed import mixed_data

from prunetune.cli import main
from prunetune.configs import ConfigError, ModelConfig
from prunetune.models import Arm
from prunetune.models.adapter import projector_state
from prunetune.models.hashes import tensor_hash
from prunetune.train import float8

# Of the trained model, whose loss such a rate can only raise: patience runs out at step 4, and nothing beats step 0.
OPTIONS = ("--train.held_out", "16", "--train.eval_steps", "2", "--train.learning_rate", "0.5", "--train.patience", "2",
           "--engine.float8", "true")  # fmt: skip


def rows(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def state(output):
    """What a run left: both adapters, what their records say of the held-out loss, and every number of the log."""
    found = {}
    for name in ("adapter", "best"):
        record = json.loads((output / name / "prunetune.json").read_text())
        found[name] = (record["step"], record["held_out"], record["projector_hash"])
    numbers = [(row["step"], row.get("loss"), row.get("held_out_loss")) for row in rows(output)]
    return found, numbers


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    if not float8.has_float8_products("cpu"):
        pytest.skip("no float8 products on this CPU")
    output = tmp_path_factory.mktemp("held_out") / "run"
    return output, run(TINY_VLM, output, *OPTIONS)


def test_a_rate_that_is_too_high_stops_early_and_the_best_adapter_is_kept(whole):
    output, printed = whole
    losses = {row["step"]: row["held_out_loss"] for row in rows(output) if "held_out_loss" in row}
    best = min(losses, key=losses.get)
    assert list(losses) == list(range(0, max(losses) + 1, 2)) and all(map(math.isfinite, losses.values()))
    found, _ = state(output)
    step, said, _ = found["best"]
    assert step == said["best_step"] == best and said["best_loss"] == losses[best] and said["samples"] == 16
    last, said, _ = found["adapter"]
    assert last == max(losses) and said["last_loss"] == losses[last] and said["best_step"] == best
    assert (best, last, said["evaluations_since"]) == (0, 4, 2)
    assert "stopped early: the last 2 were not lower" in printed
    assert f"lowest held-out loss {losses[best]:.4f} at step {best}" in printed
    record = json.loads((output / "best" / "prunetune.json").read_text())
    assert record["engine"]["float8"] is True and record["data"]["samples"] == 80  # 96 without two scenes
    assert "frozen linear layers of the LLM in e4m3" in printed
    arm = Arm.load(ModelConfig(path=str(TINY_VLM), dtype="float32"), device="cpu").with_adapter(output / "best")
    assert tensor_hash(projector_state(arm.model)) == record["projector_hash"]
    assert not float8.float8_tensors(arm.model)  # evaluation knows nothing of it


def test_a_killed_run_goes_on_to_the_same_losses_decisions_and_adapters(whole):
    output, _ = whole
    before = state(output)
    best = load_file(output / "best" / "adapter_model.safetensors")
    newest = max(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.partition("-")[2]))
    assert newest.name != "checkpoint-3"
    (newest / "complete.json").unlink()  # as if killed while this one was being written
    (output / "finished.json").unlink()
    assert f"resuming from {output / 'checkpoint-3'}" in run(TINY_VLM, output, *OPTIONS)
    assert state(output) == before
    again = load_file(output / "best" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], best[name]) for name in best)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--train.patience", "2"], "train.patience 2 counts held-out losses"),
        (["--engine.float8", "true", "--train.deepspeed", "zero3"], "engine.float8: ZeRO-3"),
        (["--engine.float8", "true", "--model.dtype", "float16"], "engine.float8 computes in bfloat16"),
        (["--engine.float8", "true", "--model.quantization", "4bit"], "engine.float8: model.quantization 4bit"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_launched(tmp_path, more, said):
    with pytest.raises((SystemExit, ConfigError)) as raised:
        main(["recalibrate", *arguments("assets/tiny_vlm", tmp_path / "o", *more)])
    assert said in str(raised.value) and "\n" not in str(raised.value) and not (tmp_path / "o").exists()


def test_ranks_measure_text_alone_and_pictures_together_under_every_stage(untrained_folder, tmp_path):
    """Batches of one: under ZeRO-3 a rank with text alone calls tower and projector as often as one with a picture."""
    options = mixed_data(tmp_path)
    found = []
    for stage in ("zero2", "zero3"):
        output = tmp_path / stage
        held_out = ("--train.deepspeed", stage, "--train.held_out", "4", "--train.eval_steps", "2")
        run(untrained_folder, output, *options, "--pruning.pruner", "downsample", *held_out)
        found.append([row["held_out_loss"] for row in rows(output) if "held_out_loss" in row])
    assert len(found[0]) > 1 and found[1] == pytest.approx(found[0], rel=1e-4)
