"""Small recalibrations that are killed at random moments and resumed. Part of ``benchmarks/reliability.py``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

from bad_inputs import ROOT, TINY_VLM

STEPS = 12
_LINE = [
    "--config", "configs/recalibrate/tiny_divprune_16.yaml", "--model.path", str(TINY_VLM),
    "--data.max_samples", "192", "--train.batch_size", "4", "--train.accumulation", "2",
    "--train.max_steps", str(STEPS), "--train.save_steps", "3", "--train.sampling", "modality_length",
    "--tracking.wandb", "offline",
]  # fmt: skip


def kills(folder: Path, number: int, seed: int) -> list[str]:
    """Kill runs ``number`` times in all, ZeRO-2 and ZeRO-3 in turn, and return the lines of the report."""
    generator = random.Random(seed)
    lines = []
    for stage in ("zero2", "zero3"):
        began = time.monotonic()
        whole = folder / f"{stage}_whole"
        _finish(_start(whole, stage))
        seconds = time.monotonic() - began
        wanted = number // 2 + (number % 2 if stage == "zero2" else 0)
        done = unlike = runs = 0
        while done < wanted:
            output = folder / f"{stage}_{runs}"
            done += _killed(output, stage, generator, seconds, wanted - done)
            unlike += not _same(whole, output)
            runs += 1
        verdict = "bitwise equal to an uninterrupted run" if unlike == 0 else f"{unlike} DIFFERS"
        lines.append(f"| SIGKILL of two ranks, {stage} | {done} kills in {runs} runs | {verdict} |")
    return lines


def _start(output: Path, stage: str) -> subprocess.Popen[bytes]:
    from prunetune.scripts.launch import launch_environment, launch_line

    output.mkdir(parents=True, exist_ok=True)
    environment = {**launch_environment(2), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    line = launch_line(2, [*_LINE, "--train.deepspeed", stage, "--output", str(output)])
    # A group of its own, so that the launcher is killed with its ranks.
    with (output / "ranks.log").open("ab") as log:
        return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def _finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait() != 0:
        raise RuntimeError(f"a run ended with {process.returncode}, see ranks.log")


def _killed(output: Path, stage: str, generator: random.Random, seconds: float, most: int) -> int:
    """Run to the end, killed on the way up to three times; return how often it was."""
    times = 0
    while times < min(most, 3):
        process = _start(output, stage)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(generator.uniform(0.2, 1.0) * seconds)
        if process.poll() is not None:  # it was faster
            _finish(process)
            return times
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        times += 1
    _finish(_start(output, stage))
    return times


def _same(one: Path, other: Path) -> bool:
    """Return whether two runs wrote the same projector and the same losses."""
    return _content(one) == _content(other)


def _content(output: Path) -> tuple[str, dict[int, float]]:
    weights = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    losses = {}
    for line in (output / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row:
            losses[row["step"]] = row["loss"]
    return hashlib.sha256(weights).hexdigest(), losses
