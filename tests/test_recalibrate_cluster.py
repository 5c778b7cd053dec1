"""Recalibrations as a cluster treats them: told to stop, started again, on two nodes, in one process, damaged."""

import json
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT
from launched import half
from launches import arguments, call, environment, losses, run, run_several
from safetensors.torch import load_file, save_file

from prunetune.train.launchers import free_port
from prunetune.train.stopping import REQUEUE

LONG = ("--train.max_steps", "30", "--train.save_steps", "11", "--train.workers", "1", "--devices", "2")
MODULE = ["-m", "prunetune.train.recalibrate"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def launched(line, **options):
    return subprocess.Popen(line, env=environment(), cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, **options)  # fmt: skip


def ended(process, status=0):
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == status, printed[-6000:]
    assert "Traceback" not in printed, printed[-6000:]
    return printed


def rank_words(folder):
    """What the one rank of a torchrun node printed, from the node's log folder."""
    out, error = sorted([*folder.rglob("stdout.log"), *folder.rglob("stderr.log")], reverse=True)
    return out.read_text() + error.read_text()


def adapter_bytes(output):
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def after_step(process, output, step):
    """Wait until the run has logged a step, and return its processes."""
    log, deadline = output / "log.jsonl", time.monotonic() + 300
    while not log.exists() or len(log.read_text().splitlines()) < step:
        assert time.monotonic() < deadline and process.poll() is None, "the run never took a step"
        time.sleep(0.02)
    return psutil.Process(process.pid).children(recursive=True)


def none_left(processes):
    """Whether all processes end: seconds later, on a machine that has nothing else to do."""
    return not psutil.wait_procs(processes, timeout=60)[1]


def prunetune(model, output, *more):
    return [sys.executable, "-m", "prunetune", "recalibrate", *arguments(model, output, *LONG, *more)]


@pytest.fixture(scope="module")
def whole(untrained_folder, tmp_path_factory):
    """A run that nobody interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run(untrained_folder, output, *LONG)
    return output


def test_a_finished_run_stays_finished(whole, untrained_folder):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file() and path.name != "launch.log"}
    printed = run(untrained_folder, whole, *LONG)
    assert "this run has finished: step 30, adapter" in printed
    assert {path: path.read_bytes() for path in before} == before


def test_sigterm_takes_a_checkpoint_and_two_nodes_go_on_from_it_to_the_same_projector(
    whole, untrained_folder, tmp_path
):
    output = tmp_path / "stopped"
    process = launched(prunetune(untrained_folder, output))
    processes = after_step(process, output, 2)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    printed = ended(process, REQUEUE)
    assert time.monotonic() - began < 60 and none_left(processes)
    assert "SIGTERM: the ranks take a checkpoint after this step, within 120 s" in printed
    assert "stopped by a signal after step" in printed and "of 30; the same command goes on" in printed
    (checkpoint,) = output.glob("checkpoint-*")
    step = json.loads((checkpoint / "complete.json").read_text())["step"]
    assert step == len(losses(output)) < 11 and not (output / "adapter").exists()

    port = str(free_port())
    options = arguments(untrained_folder, output, *LONG)
    nodes = []
    for node in ("0", "1"):
        line = [*TORCHRUN, "--nnodes", "2", "--node_rank", node, "--nproc_per_node", "1", "--master_addr", "127.0.0.1",
                "--master_port", port, "--log-dir", str(tmp_path / node), "--redirects", "3",
                *MODULE, *options]  # fmt: skip
        nodes.append(launched(line))
    for node in nodes:  # torchrun itself may mourn the other node's end, which is not ours to judge
        said = node.communicate(timeout=600)[0]
        assert node.returncode == 0, said[-6000:]
    printed = [rank_words(tmp_path / node) for node in ("0", "1")]
    assert not any("Traceback" in words for words in printed)
    assert f"resuming from {checkpoint}" in printed[0] and "resuming" not in printed[1]
    assert losses(output) == losses(whole) and adapter_bytes(output) == adapter_bytes(whole)


def test_a_scheduler_that_signals_every_process_gets_its_checkpoint(untrained_folder, tmp_path):
    process = launched(prunetune(untrained_folder, tmp_path))
    processes = after_step(process, tmp_path, 1)
    for one in [*processes, process]:  # launchers and data loading processes as well
        one.send_signal(signal.SIGTERM)
    assert "stopped by a signal after step" in ended(process, REQUEUE)
    assert none_left(processes) and list(tmp_path.glob("checkpoint-*/complete.json"))
    assert f"return code = {REQUEUE}" in (tmp_path / "launch.log").read_text()  # of the ranks themselves


def test_ranks_do_not_train_on_without_the_command_that_launched_them(untrained_folder, tmp_path):
    process = launched(prunetune(untrained_folder, tmp_path, "--train.max_steps", "100000"))
    processes = after_step(process, tmp_path, 1)
    process.kill()
    assert none_left(processes)


def test_torchrun_hands_sigterm_on(untrained_folder, tmp_path):
    process = launched([*TORCHRUN, "--nproc_per_node", "2", "--master_port", str(free_port()), *MODULE,
                        *arguments(untrained_folder, tmp_path, *LONG)])  # fmt: skip
    processes = after_step(process, tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    assert "stopped by a signal after step" in process.communicate(timeout=120)[0]
    assert none_left(processes) and list(tmp_path.glob("checkpoint-*/complete.json"))


def test_ranks_that_do_not_stop_in_time_are_ended(untrained_folder, tmp_path):
    process = launched(prunetune(untrained_folder, tmp_path, "--grace", "0.5", "--devices", "1"))
    processes = after_step(process, tmp_path, 1)
    ranks = [one for one in processes if "--marked" in one.cmdline()]
    for rank in ranks:
        rank.suspend()
    process.send_signal(signal.SIGUSR1)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == REQUEUE and "did not stop within 0.5 s and are ended" in printed
    assert none_left(processes)


def test_one_process_needs_no_launcher_and_notices_another_base(untrained_folder, tmp_path):
    base, output = tmp_path / "base", tmp_path / "run"
    shutil.copytree(untrained_folder, base)
    line = [sys.executable, *MODULE, *arguments(base, output, *LONG)]
    process = launched(line)
    after_step(process, output, 2)
    process.send_signal(signal.SIGUSR1)
    ended(process, REQUEUE)
    weights = load_file(base / "model.safetensors")
    name = next(name for name in sorted(weights) if "language_model" in name)
    save_file({**weights, name: weights[name] * 2}, base / "model.safetensors", {"format": "pt"})
    printed = run(base, output, *LONG, world=1, status=1)
    assert "was made with another base model than there is now" in printed
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    run(base, output, *LONG, world=1)
    assert losses(output).keys() == set(range(1, 31))


def test_what_is_left_of_a_run_is_used_as_far_as_it_is_whole(whole, untrained_folder, tmp_path):
    """In the same two ranks: killed before the adapter was written, a damaged checkpoint, and no step at all."""
    killed, damaged, none = (tmp_path / name for name in ("killed", "damaged", "none"))
    for copy in (killed, damaged):
        shutil.copytree(whole, copy)
        shutil.rmtree(copy / "adapter")
        (copy / "finished.json").unlink()
    broken = damaged / "checkpoint-30" / "scheduler.pt"
    broken.write_bytes(broken.read_bytes()[:-10])
    runs = [arguments(untrained_folder, killed, *LONG), arguments(untrained_folder, damaged, *LONG),
            arguments(untrained_folder, none, *LONG, "--train.max_steps", "0")]  # fmt: skip
    printed = run_several(runs)
    assert (killed / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()  # no further step
    assert f"{damaged / 'checkpoint-30'} is skipped and renamed: scheduler.pt is not what was written" in printed
    assert f"resuming from {damaged / 'checkpoint-22'}" in printed
    assert adapter_bytes(killed) == adapter_bytes(damaged) == adapter_bytes(whole)
    assert (damaged / "damaged-checkpoint-30-1").is_dir() and (damaged / "checkpoint-30" / "complete.json").is_file()
    base = load_file(untrained_folder / "model.safetensors")
    untouched = load_file(none / "adapter" / "adapter_model.safetensors")
    assert untouched and not (none / "log.jsonl").exists()
    for name, tensor in untouched.items():
        (stored,) = [own for own in base if own.endswith(name.partition("base_model.model.model.")[2])]
        assert torch.equal(tensor, base[stored])


def test_float16_goes_on_over_skipped_steps_until_the_scale_can_not_fall(untrained_folder, tmp_path):
    runs = []
    for name, least in (("falls", 1), ("stays", 2**32)):
        settings = {"enabled": "auto", "initial_scale_power": 32, "hysteresis": 1, "min_loss_scale": least}
        (tmp_path / f"{name}.json").write_text(json.dumps({
            "zero_optimization": {"stage": 2}, "fp16": settings, "gradient_clipping": "auto",
            "gradient_accumulation_steps": "auto", "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto",
        }))  # fmt: skip
        runs.append(arguments(untrained_folder, tmp_path / name, *LONG, "--model.dtype", "float16",
                              "--train.deepspeed", str(tmp_path / f"{name}.json")))  # fmt: skip
    printed = call(half.main, runs, world=1, status=1)
    rows = [json.loads(line) for line in (tmp_path / "falls" / "log.jsonl").read_text().splitlines()]
    record = json.loads((tmp_path / "falls" / "adapter" / "prunetune.json").read_text())
    skipped = record["skipped_steps"]
    assert 0 < skipped < 30 and f"{skipped} steps were skipped" in printed and rows[-1]["skipped_steps"] == skipped
    assert rows[0]["grad_norm"] is None and rows[-1]["grad_norm"] > 0 and len(rows) == 30
    assert (record["trained_in"], record["stored_in"]) == ("float16", "float32")
    assert "error: the float16 gradients overflow at every loss scale at step 1" in printed
    assert not (tmp_path / "stays" / "adapter").exists()
