"""The running mean of the weights: what it is the mean of, that training goes on as without, and after a kill."""

import json
import shutil

import pytest
import torch
from launches import arguments, run_several
from safetensors.torch import load_file

from prunetune.configs import ConfigError
from prunetune.models import load_model, wrap_projector
from prunetune.train.ema import MEAN, RunningMean, newest_share
from prunetune.train.masters import trained_parameters

FILE = "adapter_model.safetensors"
DECAY = 0.8


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_it_is_the_weighted_mean_of_all_weights_so_far(decay):
    torch.manual_seed(0)
    weights = [torch.randn(50, dtype=torch.float64) for _ in range(30)]
    mean = weights[0].clone()
    assert newest_share(decay, 0) == 1
    for step, tensor in enumerate(weights[1:], 1):
        mean.lerp_(tensor, newest_share(decay, step))
        shares = [decay ** (step - number) for number in range(step + 1)]
        expected = sum(share * weight for share, weight in zip(shares, weights, strict=False)) / sum(shares)
        torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_runs_with_it_and_then_with_its_own_weights_to_the_bit(untrained_folder, dtype):
    peft_model = wrap_projector(load_model(str(untrained_folder), dtype=dtype)[0])
    mean = RunningMean(peft_model, 0.9)
    mean.begin(None)
    trained = trained_parameters(peft_model)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.mul_(1.1)
    mean.take(1)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    with pytest.raises(RuntimeError), mean.in_place():
        for name, parameter in trained.items():
            assert torch.equal(parameter, mean.tensors[name].to(parameter.dtype))
            assert not torch.equal(parameter, before[name]) or not before[name].any()
        raise RuntimeError
    assert all(torch.equal(parameter, before[name]) for name, parameter in trained.items())


def logged(output, name):
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}


def losses(output):
    return logged(output, "loss")


def held_out(output):
    return logged(output, "held_out_loss")


def settings_of(stage, dtype):
    return ("--train.save_steps", "1", "--train.max_steps", "2", "--train.held_out", "8", "--train.eval_steps", "1",
            "--train.deepspeed", stage, "--model.dtype", dtype)  # fmt: skip


SETTINGS = [("zero1", "float32"), ("zero2", "bfloat16"), ("zero3", "bfloat16")]


@pytest.fixture(scope="module", params=SETTINGS, ids="-".join)
def runs(request, untrained_folder, tmp_path_factory):
    """A run with a mean, one without, and one gone on with after a kill, with a held-out loss after every step."""
    folder = tmp_path_factory.mktemp("-".join(request.param))
    options = settings_of(*request.param)
    several = [arguments(untrained_folder, folder / "mean", *options, "--train.ema", str(DECAY)),
               arguments(untrained_folder, folder / "plain", *options)]  # fmt: skip
    run_several(several)
    shutil.copytree(folder / "mean", folder / "killed")
    (folder / "killed" / "checkpoint-2" / "complete.json").unlink()  # as if killed while this one was being written
    (folder / "killed" / "finished.json").unlink()
    resumed = arguments(untrained_folder, folder / "killed", *options, "--train.ema", str(DECAY))
    assert f"resuming from {folder / 'killed' / 'checkpoint-1'}" in run_several([resumed])
    return folder


def test_training_is_the_same_with_and_without_it(runs):
    """Though the model ran with other weights after every step, and was given its own back."""
    assert losses(runs / "mean") == losses(runs / "plain")
    mine, theirs = (load_file(runs / name / "checkpoint-2" / FILE) for name in ("mean", "plain"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_is_measured_and_stored_is_the_mean(runs):
    mean, plain = held_out(runs / "mean"), held_out(runs / "plain")
    assert mean[0] == plain[0] and mean[2] != plain[2]
    stored, last = (load_file(runs / name / "adapter" / FILE) for name in ("mean", "plain"))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    kept = load_file(runs / "mean" / "checkpoint-2" / MEAN)
    assert all(torch.equal(stored[f"base_model.model.{name}"], tensor) for name, tensor in kept.items())
    assert any(not torch.equal(stored[name], last[name]) for name in stored)
    records = [json.loads((runs / name / "adapter" / "prunetune.json").read_text()) for name in ("mean", "plain")]
    assert records[0]["running_mean"] == records[0]["train"]["ema"] == DECAY
    assert "running_mean" not in records[1] and "ema" not in records[1]["train"]
    best = json.loads((runs / "mean" / "best" / "prunetune.json").read_text())
    assert best["running_mean"] == DECAY and best["held_out"]["best_loss"] == min(mean.values())
    if best["step"] == 2:
        assert best["projector_hash"] == records[0]["projector_hash"]


def test_it_is_of_all_steps_weights_from_those_before_the_first_on(runs, untrained_folder):
    model, _ = load_model(str(untrained_folder))
    prefix, half = "base_model.model.", "bfloat16" in runs.name
    steps = [{f"{prefix}{name}": tensor.detach() for name, tensor in model.named_parameters()}]
    steps += [load_file(runs / "plain" / f"checkpoint-{step}" / FILE) for step in (1, 2)]
    for name, tensor in load_file(runs / "mean" / "adapter" / FILE).items():
        weights = [step[name].double() for step in steps]
        expected = (DECAY**2 * weights[0] + DECAY * weights[1] + weights[2]) / (DECAY**2 + DECAY + 1)
        # Of half precision the checkpoints' weights are the rounded ones.
        tolerance = {"rtol": 1e-2, "atol": 1e-3} if half else {"rtol": 1e-6, "atol": 1e-8}
        torch.testing.assert_close(tensor.double(), expected, **tolerance)


def test_a_killed_run_ends_with_the_same_mean(runs):
    assert losses(runs / "killed") == losses(runs / "mean") and held_out(runs / "killed") == held_out(runs / "mean")
    for name in ("adapter", "best"):
        mine, theirs = (load_file(runs / run / name / FILE) for run in ("killed", "mean"))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_checkpoint_without_it_is_refused_in_one_line(untrained_folder, tmp_path):
    mean = RunningMean(wrap_projector(load_model(str(untrained_folder))[0]), 0.9)
    with pytest.raises(ConfigError, match=r"ema.safetensors can't be read .*set train.resume to never") as raised:
        mean.begin(tmp_path)
    assert "\n" not in str(raised.value)
    mean.begin(None)
    mean.write(tmp_path)
    again = RunningMean(mean.peft_model, 0.9)
    again.begin(tmp_path)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in mean.tensors.items())
