"""The whole story on the bundled tiny VLM, in minutes on a CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from prunetune.configs import (
    ConfigError,
    EvaluateConfig,
    RecalibrateConfig,
    TrackingConfig,
    load_config,
)
from prunetune.evaluation.report.arms import read_arm
from prunetune.evaluation.report.table import to_markdown
from prunetune.evaluation.run.visualize import visualize
from prunetune.models import Arm
from prunetune.outputs import DEMO, RECALIBRATION, OutputFolder
from prunetune.pruning import PruningSpec
from prunetune.screen import libraries_in, say
from prunetune.scripts.launch import LOG, launch
from prunetune.scripts.tracked import tracked_compare, tracked_evaluate

METHODS = ("fastervlm", "vispruner", "prismprune", "divprune")
BUDGETS = (36, 16)
RECIPE = "recalibrate/tiny_divprune_16"


@dataclass(frozen=True)
class Size:
    """How many test scenes each arm answers, and how many samples the projector is recalibrated on."""

    scenes: int
    samples: int


FULL = Size(scenes=200, samples=16_000)
QUICK = Size(scenes=60, samples=6_000)


def run_demo(output: Path, quick: bool = False, overwrite: bool = False) -> None:
    """Dense, four methods at two budgets, one recalibration on two CPU ranks, the same arm tuned, and the table.

    Args:
        output: folder of everything that is written; an older demo there is replaced, anything else is left alone.
        quick: fewer test scenes and training samples.
        overwrite: use a folder that holds other files as well.

    Raises:
        OutputError: if the folder holds something else than a demo, is in use, or can't be written.
        ConfigError: if the recalibration fails.
    """
    began = time.monotonic()
    with OutputFolder(output, DEMO, overwrite) as folder:
        folder.clear()
        with libraries_in(output / "libraries.log"):
            _run(output, QUICK if quick else FULL, began)


def _run(output: Path, size: Size, began: float) -> None:
    recipe = load_config(RecalibrateConfig, RECIPE)
    limit = 8 * size.scenes

    say("\n== 1/4  dense and training-free")
    dense = Arm.load(recipe.model, device="cpu")  # the one model of every arm below
    arms = [_evaluate(output, "dense", dense, limit)]
    for keep in BUDGETS:
        for method in METHODS:
            arms.append(_evaluate(output, f"{method}_{keep}", dense.with_pruning(PruningSpec(method, keep)), limit))

    say("\n== 2/4  recalibrate the projector for divprune at 16 tokens, DeepSpeed on 2 CPU ranks")
    _recalibrate(output / "recalibrate", size.samples)

    say("\n== 3/4  tuned")
    tuned = dense.with_pruning(recipe.pruning).with_adapter(output / "recalibrate" / "adapter")
    arms.append(_evaluate(output, "divprune_16_tuned", tuned, limit))

    say("\n== 4/4  compare")
    rows = tracked_compare(arms, output / "comparison", TrackingConfig(wandb="offline", name="demo"), overwrite=True)
    print(to_markdown(rows))
    specs = [PruningSpec(method, 16) for method in METHODS]
    pictures = visualize(recipe.model, specs, "tiny_world", 4, output / "kept_tokens", arm=dense, overwrite=True)
    gain = next(row for row in rows if row.gain is not None)
    assert gain.gain is not None and gain.gain_interval is not None  # the tuned row has both
    print(
        f"Recalibrating {gain.label.split(' + ')[0]} at {gain.kept:g} of 144 visual tokens gains {gain.gain:+.1f} "
        f"points (95 % interval {gain.gain_interval[0]:+.1f} to {gain.gain_interval[1]:+.1f}), "
        f"{time.monotonic() - began:.0f} s in all."
    )
    print(
        f"table        {output / 'comparison' / 'table.md'}\nplot         {output / 'comparison' / 'plot.png'}\n"
        f"kept tokens  {pictures[0].parent}\nadapter      {output / 'recalibrate' / 'adapter'}\n"
        f"W&B offline  {output / 'recalibrate' / 'wandb'}"
    )


def _evaluate(output: Path, name: str, arm: Arm, limit: int) -> Path:
    config = EvaluateConfig(
        model=arm.base.config,
        pruning=arm.spec,
        adapter=arm.adapter,
        tasks=["tiny_world"],
        limit=limit,
        batch_size=80,
        max_new_tokens=6,
        output=str(output / "arms" / name),
        overwrite=True,  # whose folder it is was settled with the demo's
    )
    folder = tracked_evaluate(config, arm)
    reached = read_arm(folder)
    say(f"{name:<20} {reached.average().overall:.1f} % right at {reached.kept:g} of 144 tokens")
    return folder


def _recalibrate(output: Path, samples: int) -> None:
    arguments = ["--config", RECIPE, "--output", str(output), "--data.max_samples", str(samples)]
    with OutputFolder(output, RECALIBRATION, overwrite=True) as folder:
        status = launch(2, arguments, folder)
    if status != 0:
        raise ConfigError(f"the recalibration ended with status {status}; what it said is above and in {output / LOG}")
