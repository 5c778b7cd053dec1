"""Launching small recalibrations on two CPU ranks, as users start them."""

import json
import subprocess

from conftest import ROOT

from prunetune.scripts.launch import launch_environment, launch_line

STEPS = 6


def arguments(model, output, *more):
    return ["--config", "configs/recalibrate/tiny_divprune_16.yaml",
            "--model.path", str(model), "--output", str(output),
            "--data.max_samples", "96", "--train.batch_size", "4", "--train.max_steps", str(STEPS),
            "--train.save_steps", "3", "--tracking.wandb", "off", *more]  # fmt: skip


def environment():
    return {**launch_environment(2), "OMP_NUM_THREADS": "1"}


def run(model, output, *more):
    done = subprocess.run(launch_line(2, arguments(model, output, *more)), env=environment(), cwd=ROOT, text=True,
                          capture_output=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def losses(output):
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}
