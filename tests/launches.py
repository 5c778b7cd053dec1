"""Small recalibrations on two CPU ranks: through a launcher as users start them, or in ranks that start at once."""

import json

from conftest import ROOT
from launched.warm import in_ranks

from prunetune.scripts.launch import launch_environment
from prunetune.train import recalibrate, several

STEPS = 6
FEW = ROOT / "tests" / "data" / "few_scenes.yaml"
"""The recipe of the bundled configurations with a tenth of its scenes, which every rank draws before it begins."""


def arguments(model, output, *more):
    return ["--config", "configs/recalibrate/tiny_divprune_16.yaml",
            "--model.path", str(model), "--output", str(output), "--data.recipe", str(FEW),
            "--data.max_samples", "96", "--train.batch_size", "4", "--train.max_steps", str(STEPS),
            "--train.save_steps", "3", "--tracking.wandb", "off", *more]  # fmt: skip


def environment():
    return {**launch_environment(2), "OMP_NUM_THREADS": "1"}


def call(function, *given, world=2, status=0, cwd=ROOT):
    """Call a function in every rank, and return what they printed."""
    ended, printed = in_ranks(world, function, *given, environment=environment(), cwd=cwd)
    assert ended == status, printed[-6000:]
    if world == 1 or not status:  # a rank that has lost another one may say so at length
        assert "Traceback" not in printed, printed[-6000:]
    return printed


def run(model, output, *more, world=2, status=0):
    """Recalibrate once."""
    return call(recalibrate.main, arguments(model, output, *more), world=world, status=status)


def run_several(runs, world=2):
    """Recalibrate with each list of arguments, one after another in the same ranks."""
    return call(several.run_all, runs, world=world)


def losses(output):
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}
