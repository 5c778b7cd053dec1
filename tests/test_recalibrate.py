"""Recalibration through the DeepSpeed launcher on two CPU ranks, as users start it."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from launches import STEPS, arguments, environment, losses, run
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from prunetune.configs import ConfigError, ModelConfig, RecalibrateConfig, TrackingConfig, TrainConfig, load_config
from prunetune.data_recipes import DataError
from prunetune.models import Arm
from prunetune.models.adapter import projector_state
from prunetune.models.hashes import tensor_hash
from prunetune.scripts.launch import launch_line
from prunetune.scripts.verify import verify
from prunetune.train.callbacks import NumbersCallback, check_finite_weights
from prunetune.train.checkpoints import Found, find_checkpoint, set_aside
from prunetune.train.engine.layout import Share, StepSampler
from prunetune.train.recalibrate import start, take_steps
from prunetune.train.sampling import ShuffledSampler, steps_in_total
from prunetune.train.tracking import Tracker, wandb_mode
from prunetune.train.trainer import RecalibrationTrainer


@pytest.fixture(scope="module")
def whole(untrained_folder, tmp_path_factory):
    """The launch line of the documentation, to the letter."""
    output = tmp_path_factory.mktemp("whole") / "run"
    line = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "train/recalibrate.py",
            *arguments(untrained_folder, output, "--tracking.wandb", "offline")]  # fmt: skip
    plain = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=plain, cwd=ROOT, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return output, done.stdout


def test_the_run_says_what_is_frozen_and_what_trains(whole):
    _, printed = whole
    assert "[FROZEN]    vision_tower" in printed and "[FROZEN]    language_model" in printed
    assert [line.split()[1] for line in printed.splitlines() if "[TRAINABLE]" in line] == ["multi_modal_projector"]


def test_the_log_has_every_step_and_w_and_b_is_offline(whole):
    output, _ = whole
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["samples_per_second"] > 0 and row["eta_seconds"] >= 0 and row["grad_norm"] > 0 for row in rows)
    assert rows[0]["learning_rate"] == pytest.approx(5e-3) and rows[-1]["learning_rate"] < 1e-3
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert list((output / "wandb").glob("offline-run-*/*.wandb"))


def test_the_adapter_changes_the_projector_and_records_the_run(whole, untrained_folder):
    output, _ = whole
    arm = Arm.load(ModelConfig(path=str(untrained_folder), dtype="float32"), device="cpu")
    base, tuned = arm.model, arm.with_adapter(output / "adapter").model
    after = tuned.state_dict()
    changed = {n for n, t in base.state_dict().items() if tensor_hash({"": t}) != tensor_hash({"": after[n]})}
    assert changed == set(projector_state(base))
    record = json.loads((output / "adapter" / "prunetune.json").read_text())
    assert record["pruning"]["pruner"] == "divprune" and record["pruning"]["keep"] == 16 and record["step"] == STEPS
    assert record["data"]["samples"] == 96 and record["train"]["seed"] == 42
    assert record["data"]["hash"].startswith("columns-1:") and len(record["data"]["hash"]) == 74
    assert {"torch", "transformers", "peft", "deepspeed"} <= record["versions"].keys() and record["wandb_run"]
    assert record["projector_hash"] == tensor_hash(projector_state(tuned))
    checks = {check.link: check.holds for check in verify(output, base=str(untrained_folder))}
    assert all(checks[link] for link in ("seal", "projector_hash", "frozen_hash", "original_projector_hash"))


def test_checkpoints_hold_nothing_frozen(whole):
    output, _ = whole
    folder = output / f"checkpoint-{STEPS}"
    assert all("multi_modal_projector" in name for name in load_file(folder / "adapter_model.safetensors"))
    state = torch.load(next(folder.glob("global_step*/mp_rank_00_model_states.pt")), weights_only=False)
    assert state["module"] and all("modules_to_save.default" in name for name in state["module"])


def test_a_killed_run_goes_on_to_the_same_losses_and_the_same_projector(whole, untrained_folder, tmp_path):
    output = tmp_path / "killed"
    line = launch_line(2, arguments(untrained_folder, output))
    process = subprocess.Popen(line, env=environment(), cwd=ROOT, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 300
    while not (output / "checkpoint-3" / "complete.json").exists():
        assert time.monotonic() < deadline and process.poll() is None, "the first checkpoint never came"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for folder in output.glob("checkpoint-[4-9]"):  # if it was faster than the kill
        (folder / "complete.json").unlink(missing_ok=True)
    assert not (output / "adapter").exists()
    printed = run(untrained_folder, output)
    assert f"resuming from {output / 'checkpoint-3'}" in printed
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))  # no step twice
    assert losses(output) == losses(whole[0])
    mine, theirs = (load_file(o / "adapter" / "adapter_model.safetensors") for o in (output, whole[0]))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_zero3_trains_and_resumes_to_the_same_projector_as_zero2(whole, untrained_folder, tmp_path):
    output, options = tmp_path / "zero3", ("--train.deepspeed", "zero3", "--engine.checkpointing", "true")
    run(untrained_folder, output, *options)
    assert losses(output) == pytest.approx(losses(whole[0]), rel=1e-4)
    adapter = output / "adapter" / "adapter_model.safetensors"
    mine, theirs = load_file(adapter), load_file(whole[0] / "adapter" / "adapter_model.safetensors")
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)
    before = losses(output)
    (output / f"checkpoint-{STEPS}" / "complete.json").unlink()  # as if killed while this one was being written
    (output / "finished.json").unlink()
    assert f"resuming from {output / 'checkpoint-3'}" in run(untrained_folder, output, *options)
    assert losses(output) == before
    assert all(torch.equal(tensor, mine[name]) for name, tensor in load_file(adapter).items())


def test_resuming_under_other_settings_is_refused(whole, untrained_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, file, *overrides = arguments(untrained_folder, whole[0], "--train.learning_rate", "1e-3")
    with pytest.raises(ConfigError, match="a run with other settings for train has finished in"):
        start(load_config(RecalibrateConfig, file, overrides))
    unfinished = tmp_path / "unfinished"
    shutil.copytree(whole[0], unfinished, ignore=shutil.ignore_patterns("adapter"))
    with pytest.raises(ConfigError, match="checkpoint-6 was written with other settings for train"):
        start(load_config(RecalibrateConfig, file, [*overrides, "--output", str(unfinished)]))


def test_prunetune_recalibrate_stops_before_launching_on_a_wrong_key(tmp_path):
    line = [sys.executable, "-m", "prunetune", "recalibrate", *arguments("m", tmp_path), "--train.lr", "1"]
    done = subprocess.run(line, cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 1 and "train.lr: unknown key" in done.stderr and "Traceback" not in done.stderr


# ---- the parts that need no launch -----------------------------------------------------------------------------


class _Arguments:
    output_dir = "o"


@pytest.mark.parametrize("logs", [{"loss": math.nan}, {"loss": math.inf}, {"loss": 1.0, "grad_norm": math.nan}])
def test_a_loss_or_gradient_that_is_no_number_stops(logs):
    callback = NumbersCallback(None, 8)
    with pytest.raises(FloatingPointError, match="became (nan|inf) at step 7; the last checkpoint in o"):
        callback.on_log(_Arguments(), TrainerState(global_step=7), TrainerControl(), logs=logs)


def test_float16_steps_that_deepspeed_skips_are_counted_and_no_error(tmp_path):
    """The numbers alone; DeepSpeed itself skips steps in tests/test_recalibrate_cluster.py."""
    engine = {"skipped": 2}  # of the run before, whose checkpoint this one goes on from
    tracker = Tracker(TrackingConfig(), tmp_path, {})
    callback = NumbersCallback(tracker, 8, skips=lambda: engine["skipped"])
    state, control = TrainerState(global_step=7, max_steps=9), TrainerControl()
    callback.on_train_begin(_Arguments(), state, control)
    engine["skipped"] = 3
    callback.on_log(_Arguments(), state, control, logs={"loss": 1.0, "grad_norm": math.inf})
    callback.on_log(_Arguments(), state, control, logs={"loss": 1.0, "grad_norm": 2.0})
    callback.on_train_end(_Arguments(), state, control)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["skipped_steps"], row["grad_norm"]) for row in rows] == [(3, None), (3, 2.0)]
    with pytest.raises(FloatingPointError, match="the grad_norm became inf"):  # of a step that was not skipped
        callback.on_log(_Arguments(), state, control, logs={"loss": 1.0, "grad_norm": math.inf})
    engine["skipped"] = 4
    with pytest.raises(FloatingPointError, match="the loss became inf"):
        callback.on_log(_Arguments(), state, control, logs={"loss": math.inf, "grad_norm": math.inf})


def test_a_loss_scale_that_can_not_fall_further_is_one_line():
    class Trainer:
        args, state = _Arguments(), TrainerState(global_step=7)

        def train(self, resume_from_checkpoint):
            DynamicLossScaler(init_scale=1, scale_window=1, min_scale=1, delayed_shift=1,
                              consecutive_hysteresis=False).update_scale(True)  # fmt: skip

    with pytest.raises(FloatingPointError, match="overflow at every loss scale at step 8; the last checkpoint in o"):
        take_steps(Trainer(), None)


class _Stuck:
    """Data of which nothing is ever read."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(60)


def test_data_loading_processes_that_are_stuck_end_the_run_in_one_line(formatter, tmp_path, monkeypatch):
    monkeypatch.setattr("prunetune.train.trainer.PATIENCE", 1)
    options = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, dataloader_num_workers=1,
                                remove_unused_columns=False)  # fmt: skip
    updates = StepSampler(ShuffledSampler(4, 0), Share(0, 1, 4, 1))
    trainer = RecalibrationTrainer(formatter, _Stuck(), updates, None, model=torch.nn.Linear(1, 1), args=options)
    monkeypatch.setattr(trainer, "train", lambda **_: next(iter(trainer.get_train_dataloader())))
    with pytest.raises(DataError, match="gave no batch for .* at step 1; the last checkpoint in .* is untouched"):
        take_steps(trainer, None)


def test_weights_that_are_no_numbers_are_not_saved():
    layer = torch.nn.Linear(2, 2)
    check_finite_weights(layer)
    with torch.no_grad():
        layer.bias[0] = math.inf
    with pytest.raises(FloatingPointError, match="bias became NaN or infinite"):
        check_finite_weights(layer)


def test_starting_over_sets_the_earlier_run_aside(tmp_path):
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "log.jsonl").write_text("{}")
    set_aside(tmp_path)
    assert {p.name for p in (tmp_path / "superseded-1").iterdir()} == {"checkpoint-9", "log.jsonl"}
    assert find_checkpoint(tmp_path, {}) == Found()


@pytest.mark.parametrize(("samples", "world", "batch", "accumulation", "epochs", "steps"),
                         [(24000, 2, 64, 1, 1, 188), (180510, 8, 16, 1, 1, 1411), (100, 2, 10, 2, 2, 6)])  # fmt: skip
def test_total_steps(samples, world, batch, accumulation, epochs, steps):
    train = TrainConfig(batch_size=batch, accumulation=accumulation, epochs=float(epochs))
    assert steps_in_total(train, samples, world) == steps


def test_w_and_b_online_without_a_key_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no W&B key; set WANDB_API_KEY or run `wandb login`"):
        wandb_mode("online")
    assert wandb_mode("auto") == "offline" and "no key found" in capsys.readouterr().out
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode("online") == "online" and wandb_mode("auto") == "online" and wandb_mode("offline") == "offline"


def test_an_unreachable_w_and_b_does_not_stop_the_run(monkeypatch, tmp_path, capsys):
    import wandb

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    real = wandb.init

    def unreachable(mode, **options):
        if mode == "online":
            raise wandb.errors.CommError("no route to host")
        return real(mode=mode, **options)

    monkeypatch.setattr(wandb, "init", unreachable)
    tracker = Tracker(TrackingConfig(wandb="online"), tmp_path, {})
    tracker.log({"loss": 1.0}, step=1)
    tracker.close()
    assert "goes on offline" in capsys.readouterr().out
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 1, "loss": 1.0}
