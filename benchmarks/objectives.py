"""What an objective costs: a step of the tiny VLM towards each, relative to the cross entropy.

    python benchmarks/objectives.py [--steps 9] [--keep 16] [--output FILE]

A step is the images' encoding, the teacher where there is one, forward and backward; batches are made before. The
objectives take turns, so that whatever else the machine does meets all of them; ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from prunetune.assets import shipped
from prunetune.configs import RecalibrateConfig, load_config
from prunetune.configs.schema import ObjectiveConfig
from prunetune.data_recipes import load_recipe
from prunetune.models import Arm
from prunetune.models.adapter import projector_state
from prunetune.models.ranks import Ranks
from prunetune.outputs import TEACHER, OutputFolder
from prunetune.train.objectives.aim import Aim
from prunetune.train.objectives.start import aim_of
from prunetune.train.objectives.teach import teach

BATCH = 32
OBJECTIVES: dict[str, dict[str, Any]] = {
    "ce": {"terms": {"ce": 1.0}},
    "gce": {"terms": {"gce": 1.0}},
    "ce + anchor": {"terms": {"ce": 1.0, "anchor": 1.0}},
    "kl, live": {"terms": {"kl": 1.0}},
    "kl, stored": {"terms": {"kl": 1.0}, "teacher": "stored"},
    "hidden, live": {"terms": {"hidden": 1.0}},
    "hidden, stored": {"terms": {"hidden": 1.0}, "teacher": "stored"},
    "hidden of layer 1, live": {"terms": {"hidden": 1.0}, "hidden_layer": 1},
    "hidden of layer 2, live": {"terms": {"hidden": 1.0}, "hidden_layer": 2},
    "hidden of layer 1, stored": {"terms": {"hidden": 1.0}, "hidden_layer": 1, "teacher": "stored"},
    "hidden of layer 2, stored": {"terms": {"hidden": 1.0}, "hidden_layer": 2, "teacher": "stored"},
    "feature, live": {"terms": {"feature": 1.0}},
    "gce + hidden, live": {"terms": {"gce": 1.0, "hidden": 1.0}},
    "gce + hidden, stored": {"terms": {"gce": 1.0, "hidden": 1.0}, "teacher": "stored"},
}


def configured(folder: Path, keep: int, objective: dict[str, Any]) -> RecalibrateConfig:
    """Return the configuration of a run towards an objective; a stored teacher lies below the folder."""
    values = dict(objective)
    if "teacher" in values:
        values["teacher"] = str(folder / f"teacher{values.get('hidden_layer', '')}")
    config = load_config(
        RecalibrateConfig,
        "configs/recalibrate/tiny_divprune_16.yaml",
        ["--model.path", shipped("assets/tiny_vlm"), "--pruning.keep", str(keep), "--output", str(folder / "run")],
    )
    data = config.data.model_copy(update={"max_samples": BATCH})
    return config.model_copy(update={"data": data, "objective": ObjectiveConfig(**values)})


def aims(folder: Path, keep: int) -> dict[str, tuple[Aim, Any, dict[str, Any]]]:
    """Return by objective its aim, the model that trains, and a batch."""
    found = {}
    for name, objective in OBJECTIVES.items():
        config = configured(folder, keep, objective)
        stored = config.objective.teacher
        if stored is not None and not Path(stored).exists():
            with OutputFolder(stored, TEACHER) as output:
                teach(config, output, Ranks(), hidden=True)
        arm = Arm.load(config.model, config.pruning, device="cpu")
        data = load_recipe(config.data.recipe, **config.data.model_dump(exclude={"recipe"}))
        formatter = arm.formatter(data.images, config.train.max_length)
        aim = aim_of(config, arm, formatter, data)
        arm.model.requires_grad_(False).train()
        for parameter in projector_state(arm.model, keep_vars=True).values():
            parameter.requires_grad_(True)
        if aim.anchor is not None:
            aim.anchor.hold(arm.model)
        batch = formatter.training_batch([data[number] for number in range(BATCH)])
        found[name] = aim, arm.model, arm.place(batch, formatter.finish)
    return found


def step(aim: Aim, model: Any, batch: dict[str, Any]) -> float:
    """Return the seconds of forward and backward on one batch."""
    with aim.attached("cpu"):
        began = time.perf_counter()
        units = aim.losses(model, batch).units
        torch.stack(list(units.values())).sum().backward()
        return time.perf_counter() - began


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--keep", type=int, default=16)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs = aims(folder, options.keep)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(options.steps + 1):
            for name, run in runs.items():
                took = step(*run)
                if turn:  # the first is for what is only set up
                    times[name].append(took)
    medians = {name: statistics.median(values) for name, values in times.items()}
    told = f"{BATCH} samples, divprune at {options.keep} of 144 tokens, one core"
    print(f"tiny VLM, {told}: ce {1e3 * medians['ce']:.0f} ms")
    print("| objective | step, relative to ce |\n| --- | ---: |")
    for name, median in medians.items():
        print(f"| {name} | {median / medians['ce']:.2f} |")
    if options.output is not None:
        options.output.write_text(json.dumps(times, indent=1) + "\n")


if __name__ == "__main__":
    main()
