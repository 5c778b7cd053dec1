"""Small recalibrations that are killed, or run out of disk, and go on. Part of ``benchmarks/reliability.py``."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bad_inputs import ROOT, TINY_VLM

STEPS = 12
KILLS_A_RUN = 5
REQUEUE = 75  # the status of a run that goes on later
AT_START = 0.3
"""Share of kills that come before the run has taken a step since it was started."""
_OPTIONS = [
    "--config", "configs/recalibrate/tiny_divprune_16.yaml", "--model.path", str(TINY_VLM),
    "--data.max_samples", "192", "--train.batch_size", "4", "--train.accumulation", "2",
    "--train.max_steps", str(STEPS), "--train.save_steps", "3", "--train.sampling", "modality_length",
    "--tracking.wandb", "offline",
]  # fmt: skip


def kills(folder: Path, number: int, seed: int) -> list[str]:
    """Kill runs ``number`` times in all, under both launchers and ZeRO-2 and 3; return the lines of the report."""
    generator = random.Random(seed)
    lines = []
    settings = list(itertools.product(("deepspeed", "torchrun"), ("zero2", "zero3")))
    for place, (launcher, stage) in enumerate(settings):
        began = time.monotonic()
        whole = folder / f"{launcher}_{stage}_whole"
        _finish(_start(whole, launcher, stage))
        seconds = time.monotonic() - began
        wanted = number // len(settings) + (place < number % len(settings))
        done = unlike = runs = 0
        steps: list[int] = []
        while done < wanted:
            output = folder / f"{launcher}_{stage}_{runs}"
            at = _killed(output, launcher, stage, generator, seconds, wanted - done)
            steps += at
            done += len(at)
            unlike += _content(whole) != _content(output)
            runs += 1
            shutil.rmtree(output)
            print(f"{launcher} {stage}: {done} of {wanted} kills in {runs} runs, {unlike} differ", flush=True)
        verdict = "bitwise equal to an uninterrupted run" if unlike == 0 else f"{unlike} DIFFERS"
        spread = f"after steps {min(steps)} to {max(steps)}, {sum(step == 0 for step in steps)} before the first"
        lines.append(
            f"| SIGKILL of two ranks, {launcher}, {stage} | {done} kills in {runs} runs, {spread} | {verdict} |"
        )
    return lines


def full_disks(disk: Path, number: int) -> list[str]:
    """Let runs meet a full disk at ``number`` points, free it, and let them go on; return the lines of the report.

    Args:
        disk: a folder on a small file system of its own, which is filled up: on Linux
            ``mount -t tmpfs -o size=256m tmpfs FOLDER``.
        number: how many points, between no room at all and what a whole run takes.
    """
    if shutil.disk_usage(disk).total > 1 << 30:
        raise SystemExit(f"{disk} is on a disk of more than 1 GiB; give a small one, which is filled up")
    whole = disk / "whole"
    free = shutil.disk_usage(disk).free
    _finish(_start(whole, "prunetune", "zero2", log=disk.parent / f"{disk.name}_whole.log"))
    need = free - shutil.disk_usage(disk).free
    content = _content(whole)
    shutil.rmtree(whole)
    told = unlike = 0
    wrong = []
    for point in range(number):
        output, ballast = disk / f"run_{point}", disk / "ballast"
        room = need * (2 * point + 1) // (2 * number)
        with ballast.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(disk).free - room)
        process = _start(output, "prunetune", "zero2", log=disk.parent / f"{disk.name}_{point}.log")
        status = process.wait()
        shown = (disk.parent / f"{disk.name}_{point}.log").read_text(errors="replace")
        lines = [line for line in shown.splitlines() if "error: " in line]
        # A line of each rank that was writing: both hold a part of the optimizer's state.
        readable = bool(lines) and all("can't be written" in line for line in lines) and "Traceback" not in shown
        in_words = readable and status not in (0, REQUEUE)
        told += in_words
        if not in_words:
            wrong.append(f"room for {room:,} bytes: status {status}\n{shown[-2000:]}")
        ballast.unlink()
        _finish(_start(output, "prunetune", "zero2", log=disk.parent / f"{disk.name}_{point}_again.log"))
        unlike += _content(output) != content
        print(f"full disk {point + 1} of {number}: {told} told in one line, {unlike} differ", flush=True)
        shutil.rmtree(output)
    print("\n".join(wrong))
    verdict = "then bitwise equal to an uninterrupted run" if unlike == 0 else f"{unlike} DIFFERS"
    words = "all told in one line by each rank that met it"
    if told < number:
        words = f"{number - told} with a TRACEBACK or no word"
    return [f"| disk full at {number} points of {need / 2**20:.0f} MiB, freed, started again | {words} | {verdict} |"]


def _line(launcher: str, arguments: list[str]) -> list[str]:
    from prunetune.scripts.launch import launch_line
    from prunetune.train.launchers import free_port

    if launcher == "prunetune":
        return [sys.executable, "-m", "prunetune", "recalibrate", *arguments, "--devices", "2"]
    if launcher == "deepspeed":
        return launch_line(2, arguments)
    runner = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    return [*runner, "--module", "prunetune.train.recalibrate", *arguments]


def _start(output: Path, launcher: str, stage: str, log: Path | None = None) -> subprocess.Popen[bytes]:
    from prunetune.scripts.launch import launch_environment

    output.parent.mkdir(parents=True, exist_ok=True)
    environment = {**launch_environment(2), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    line = _line(launcher, [*_OPTIONS, "--train.deepspeed", stage, "--output", str(output)])
    # A group of its own, so that the launcher is killed with its ranks.
    # Beside the folder, in which there is nothing but the run's own: it would be refused otherwise.
    with (log or output.with_name(f"{output.name}.log")).open("ab") as stream:
        return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True)


def _finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait() != 0:
        raise RuntimeError(f"a run ended with {process.returncode}: {process.args!r}")


def _killed(output: Path, launcher: str, stage: str, generator: random.Random, seconds: float, most: int) -> list[int]:
    """Run to the end, killed on the way some times; return the steps that were logged when it was."""
    killed: list[int] = []
    while len(killed) < min(most, KILLS_A_RUN):
        process = _start(output, launcher, stage)
        _wait(process, output, generator, seconds)
        if process.poll() is not None:  # it was faster
            _finish(process)
            return killed
        _kill_all(process)
        killed.append(_steps(output))
    _finish(_start(output, launcher, stage))
    return killed


def _wait(process: subprocess.Popen[bytes], output: Path, generator: random.Random, seconds: float) -> None:
    """Wait for a random moment: a time since the start, or a time after a step that is still to come."""
    if generator.random() < AT_START:
        _sleep(process, generator.uniform(0, seconds / 2))
        return
    step = _steps(output) + generator.randint(1, 4)
    while _steps(output) < min(step, STEPS) and process.poll() is None:
        time.sleep(0.05)
    # A step takes about a second here, and a checkpoint as well: the moment falls anywhere in them.
    _sleep(process, generator.uniform(0, 2))


def _sleep(process: subprocess.Popen[bytes], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.01)


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill a launcher with its ranks; torchrun gives every rank a group of its own."""
    import psutil

    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    for one in family:
        if one.is_running():
            one.kill()
    process.wait()
    psutil.wait_procs(family, timeout=30)


def _steps(output: Path) -> int:
    return len(_losses(output))


def _losses(output: Path) -> dict[int, float]:
    losses = {}
    for row in _rows(output / "log.jsonl"):
        if "loss" in row:
            losses[row["step"]] = row["loss"]
    return losses


def _rows(log: Path) -> Iterator[dict]:
    if not log.exists():
        return
    for line in log.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # the last may be in writing
            yield json.loads(line)


def _content(output: Path) -> tuple[str, dict[int, float]]:
    """Return what two equal runs have in common: the projector's bytes and the losses."""
    weights = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest(), _losses(output)
