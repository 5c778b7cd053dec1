"""Run the stages: optimizer, schedule, resumable state, log."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from prunetune.tiny_world import split_seeds
from prunetune.tiny_world.training.model import save_tiny_vlm
from prunetune.tiny_world.training.stages import (
    STAGES,
    Stage,
    TinyModels,
    dense_accuracy,
    stage_loss,
    trained_parameters,
)

SAVE_EVERY = 100
PRINT_EVERY = 20


def train_tiny_vlm(output: Path, work: Path, seed: int = 0, scale: float = 1.0, stop_after: int | None = None) -> None:
    """Train the tiny VLM and write it to ``output``; a killed run goes on from ``work/state.pt``.

    Args:
        output: folder for the finished model.
        work: folder for the resumable state and ``log.jsonl``.
        seed: seed of the initial weights. Scenes are a function of the step alone.
        scale: factor on every stage's steps, for a quick trial.
        stop_after: stop after this many steps of this call, with the state saved.
    """
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    models = TinyModels()
    stages = []
    for stage in STAGES:
        steps = max(2, round(stage.steps * scale))
        stages.append(replace(stage, steps=steps))
    state = _load(work / "state.pt", models, seed, stages)
    total = sum(stage.steps for stage in stages)
    taken, began = 0, time.monotonic()
    for index in range(state["stage"], len(stages)):
        stage = stages[index]
        done_before = sum(earlier.steps for earlier in stages[:index])
        optimizer = _optimizer(models, stage, state.pop("optimizer", None))
        for step in range(state["step"], stage.steps):
            # Scenes follow from the step, so that a resumed run sees the ones it would have seen.
            numbers = _step(models, optimizer, stage, step, first_seed=32 * (done_before + step))
            taken += 1
            if (step + 1) % PRINT_EVERY == 0 or step + 1 == stage.steps:
                speed = taken / (time.monotonic() - began)
                left = (total - done_before - step - 1) / speed
                row = {"stage": stage.name, "step": step + 1, "of": stage.steps}
                row["eta_min"] = round(left / 60, 1)
                row["scenes_per_s"] = round(speed * stage.batch, 1)
                row |= {name: round(value, 3) for name, value in numbers.items()}
                _log(work, row)
            if (step + 1) % SAVE_EVERY == 0 or taken == stop_after:
                _save(work / "state.pt", models, optimizer, index, step + 1, seed, stages)
            if taken == stop_after:
                return
        if stage.lr and index in (1, 2, 3):  # stages that train answers
            scenes = round(300 * min(scale, 1))
            _report(work, models, stage, max(10, scenes))
        state["step"] = 0
        _save(work / "state.pt", models, None, index + 1, 0, seed, stages)
    save_tiny_vlm(output, models.llava, models.clip)


def _optimizer(models: TinyModels, stage: Stage, saved: dict | None) -> torch.optim.Optimizer:
    models.requires_grad_(False)
    groups = trained_parameters(models, stage)
    for group in groups:
        group["peak"] = group["lr"]  # the schedule overwrites the rate itself
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02)
    if saved is not None:
        optimizer.load_state_dict(saved)
    return optimizer


def _step(models: TinyModels, optimizer: torch.optim.Optimizer, stage: Stage, step: int, first_seed: int) -> dict:
    warmup = min(1.0, (step + 1) / stage.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    share = warmup * (0.03 + 0.97 * cosine)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    seeds = split_seeds("pretrain", stage.batch, first_seed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, numbers = stage_loss(models, stage, seeds, step / stage.steps)
    if not torch.isfinite(loss):
        raise RuntimeError(f"loss became {loss.item()} at step {step} of stage {stage.name}; the last state is kept")
    optimizer.zero_grad()
    loss.backward()
    trained = []
    for group in optimizer.param_groups:
        trained += group["params"]
    # Over both groups together, so that clipping changes the step's length and not its direction.
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    return {"loss": loss.item(), **numbers}


def _report(work: Path, models: TinyModels, stage: Stage, scenes: int) -> None:
    batches = []
    for start in range(0, scenes, 50):
        size = min(50, scenes - start)
        batches.append(split_seeds("validation", size, start))
    for share in (1.0, 0.5):  # whole images, and images with half of their tokens
        accuracy = dense_accuracy(models, iter(batches), share)
        row = {"stage": stage.name, "validation_keep": share}
        row |= {kind: round(value, 1) for kind, value in accuracy.items()}
        _log(work, row)


def _log(work: Path, row: dict) -> None:
    line = json.dumps(row)
    print(line, flush=True)
    with (work / "log.jsonl").open("a") as log:
        log.write(line + "\n")


def _save(path: Path, models: TinyModels, optimizer, stage: int, step: int, seed: int, stages: list[Stage]) -> None:
    state = {
        "models": models.state_dict(),
        "stage": stage,
        "step": step,
        "seed": seed,
        "stages": [asdict(s) for s in stages],
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    # A run killed while it writes must find the older state whole.
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _load(path: Path, models: TinyModels, seed: int, stages: list[Stage]) -> dict:
    if not path.exists():
        return {"stage": 0, "step": 0}
    state = torch.load(path, weights_only=False)
    wanted = {"seed": seed, "stages": [asdict(s) for s in stages]}
    # A state of another seed or of other stages would go on as a run that nobody asked for.
    for name, value in wanted.items():
        if state[name] != value:
            raise ValueError(
                f"{path} was written with {name}={state[name]}, this run has {value}; "
                "use another --work folder or delete the old one"
            )
    models.load_state_dict(state.pop("models"))
    print(f"resuming at stage {state['stage']}, step {state['step']}", flush=True)
    return state
