"""A run's own numbers, by a clock that the test sets."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_flops import tiny_llava

from prunetune.configs import TrackingConfig
from prunetune.train.callbacks import NumbersCallback
from prunetune.train.flops import flops_of, image, sequences
from prunetune.train.gpus import GPUS, gpu_of_device
from prunetune.train.measured import RunNumbers, measured_peak, peak_memory
from prunetune.train.shape import shape_of
from prunetune.train.tracking import Tracker

STATUS = Path("/proc/self/status")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def spend(numbers, clock, name, seconds):
    with numbers.phase(name):
        clock.now += seconds


def test_a_row_is_about_the_time_since_the_one_before(clock):
    numbers = RunNumbers("cpu", ranks=2, clock=clock)
    for wait, kept in ((1, [16, 16]), (3, [12])):
        spend(numbers, clock, "data", wait)
        spend(numbers, clock, "forward", 2)
        spend(numbers, clock, "backward", 4)
        numbers.add(samples=3, tokens=600, supervised=30, kept=kept)
    first = numbers.row()
    assert first["samples_per_second"] == round(2 * 6 / 16, 2) and first["tokens_per_second"] == 2 * 1200 / 16
    assert (first["tokens"], first["supervised_tokens"]) == (1200, 60)
    assert first["data_wait"] == 4 / 16
    assert (first["seconds_data"], first["seconds_forward"], first["seconds_backward"]) == (4, 4, 8)
    assert (first["kept_mean"], first["kept_min"], first["kept_max"]) == (14.67, 12, 16)
    clock.now += 10  # a checkpoint is written: of no phase, and yet of the time
    spend(numbers, clock, "forward", 10)
    numbers.add(samples=2, tokens=100, kept=torch.tensor([[20], [8]]))
    second = numbers.row()
    assert second["seconds_forward"] == 10 and "seconds_data" not in second and second["data_wait"] == 0
    assert second["tokens_per_second"] == 2 * 100 / 20 and second["samples_per_second"] == 0.2
    whole = numbers.summary()
    assert whole["tokens"] == 1300 and whole["seconds_forward"] == 14 and whole["measured_seconds"] == 36
    assert (whole["kept_mean"], whole["kept_min"], whole["kept_max"]) == (round(72 / 5, 2), 8, 20)
    assert "mfu" not in whole and "prediction_error" not in whole


def test_a_phase_within_a_phase_is_counted_for_itself_alone(clock):
    numbers = RunNumbers("cpu", clock=clock)
    with numbers.phase("forward"):
        clock.now += 1
        spend(numbers, clock, "selection", 5)
        with pytest.raises(ValueError), numbers.phase("other"):
            clock.now += 2
            raise ValueError
        clock.now += 1
    row = numbers.row()
    assert (row["seconds_forward"], row["seconds_selection"], row["seconds_other"]) == (2, 5, 2)


def test_mfu_is_needed_flop_over_what_the_device_could_have_done(clock):
    shape = shape_of(tiny_llava())
    work = sequences([30, 40]) + image(37)
    needed = flops_of(shape, work).model
    numbers = RunNumbers("cpu", shape, ranks=8, peak=needed, clock=clock)  # in one second at its peak
    numbers.add(2, 70, work=work)
    numbers.add(2, 70, work=work)
    clock.now += 8
    assert numbers.row()["mfu"] == 0.25  # of this device: all ranks do as much
    assert numbers.summary()["mfu"] == 0.25


def test_a_prediction_is_held_against_what_was_measured(clock):
    numbers = RunNumbers("cpu", predicted=40, clock=clock)
    clock.now += 50
    numbers.row()
    summary = numbers.summary()
    assert (summary["measured_seconds"], summary["predicted_seconds"], summary["prediction_error"]) == (50, 40, 0.25)


def test_the_log_has_the_rows_and_a_file_the_whole_run(clock, tmp_path, capsys):
    numbers = RunNumbers("cpu", predicted=8, clock=clock)
    tracker = Tracker(TrackingConfig(), tmp_path, {})
    callback = NumbersCallback(tracker, samples_per_step=2, measured=numbers)
    arguments = SimpleNamespace(output_dir=str(tmp_path))
    state = SimpleNamespace(global_step=0, max_steps=2, epoch=0.0)
    callback.on_train_begin(arguments, state, None)
    for state.global_step in (1, 2):
        spend(numbers, clock, "data", 5)
        numbers.add(2, 70, kept=[16, 16])
        callback.on_log(arguments, state, None, {"loss": 1.0, "learning_rate": 0.1})
    callback.on_train_end(arguments, state, None)
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    whole = json.loads((tmp_path / "numbers.json").read_text())
    assert first["tokens_per_second"] == second["tokens_per_second"] == 14 and first["loss"] == 1.0
    assert (whole["tokens"], whole["prediction_error"], whole["kept_mean"]) == (140, 0.25, 16)
    assert "measured: 10 s, 0.4 samples/s, 14 tokens/s, 100.0% waiting for data" in capsys.readouterr().out
    NumbersCallback(None, samples_per_step=2).on_train_end(arguments, state, None)


def test_a_run_without_images_has_no_kept_tokens(clock):
    numbers = RunNumbers("cpu", clock=clock)
    numbers.add(1, 10, kept=[])
    clock.now += 1
    assert not any(name.startswith("kept") for name in numbers.row())


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc")
def test_the_memory_of_a_process_is_its_peak():
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
    assert peak_memory(torch.device("cpu")) == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)


def test_a_measured_peak_is_that_of_a_product():
    """A tenth of a GFLOP/s is below, a PFLOP/s above what any CPU does."""
    assert 1e8 < measured_peak("cpu", torch.float32, size=256) < 1e15


@pytest.mark.parametrize(("title", "name"), [
    ("NVIDIA H200", "h200"),
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA A100-SXM4-80GB", "a100-80"),
    ("NVIDIA A100 80GB PCIe", "a100-80"),
    ("NVIDIA A100-SXM4-40GB", "a100-40"),
    ("NVIDIA L40S", "l40s"),
    ("NVIDIA L4", "l4"),
    ("NVIDIA L40", None),
    ("NVIDIA RTX A6000", "a6000"),
    ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ("NVIDIA B200", "b200"),
    ("Tesla V100-SXM2-32GB", None),
])  # fmt: skip
def test_a_gpu_is_known_by_what_the_driver_calls_it(title, name):
    assert gpu_of_device(title) is (None if name is None else GPUS[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_phases_of_a_gpu_are_timed_by_the_device():
    numbers = RunNumbers("cuda", peak=1e12)
    matrix = torch.ones(4096, 4096, device="cuda")
    with numbers.phase("forward"):
        for _ in range(20):
            matrix @ matrix
        with numbers.phase("selection"):
            matrix @ matrix
    numbers.add(1, 1, kept=torch.tensor([4], device="cuda"))
    row = numbers.row()
    assert row["seconds_forward"] > 5 * row["seconds_selection"] > 0 and row["kept_max"] == 4
