"""Run the stages: optimizers, schedule, resumable state, gates, log."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from prunetune.tiny_world import split_seeds
from prunetune.tiny_world.hard.training.model import save_hard_vlm
from prunetune.tiny_world.hard.training.stages import STAGES, HardModels, Stage, stage_accuracy, stage_loss, trained

SAVE_EVERY = 100
PRINT_EVERY = 20
CHECKED = 100
"""Validation scenes that a stage is judged on."""


def train_hard_vlm(
    output: Path, work: Path, seed: int = 0, scale: float = 1.0, only: Sequence[str] = (), stop_after: int | None = None
) -> None:
    """Train the hard VLM and write it to ``output``; finished stages are kept in ``work``, and begun ones go on.

    The stages tower and words need nothing of one another: two processes may train one each (``only``), and a third
    call without it does the rest.

    Args:
        output: folder for the finished model.
        work: folder for the weights of each stage, the resumable state and ``log.jsonl``.
        seed: seed of the initial weights. Scenes are a function of stage and step alone.
        scale: factor on every stage's steps, for a quick trial; below 1 no gate is held.
        only: names of the stages to train in this call; all that are not finished, if empty.
        stop_after: stop after this many steps of this call, with the state saved.

    Raises:
        RuntimeError: if a stage ends below its gate, or a loss is not finite.
        ValueError: if a state in ``work`` is of another seed or of other stages, or a name in ``only`` is unknown.
    """
    unknown = sorted(set(only) - {stage.name for stage in STAGES})
    if unknown:
        raise ValueError(f"unknown stage {unknown[0]!r}; there are {', '.join(stage.name for stage in STAGES)}")
    work.mkdir(parents=True, exist_ok=True)
    taken = 0
    for stage in STAGES:
        shortened = stage.scaled(scale)
        if (work / f"{stage.name}.pt").exists() or (only and stage.name not in only):
            continue
        torch.manual_seed(seed)
        models = HardModels()
        _load_finished(work, models, shortened, seed, scale)
        left = None if stop_after is None else stop_after - taken
        taken += _train_stage(work, models, shortened, seed, left)
        if taken == stop_after:
            return
        _judge(work, models, shortened, scale)
        _save(work / f"{stage.name}.pt", models, shortened, seed)
        (work / f"{stage.name}.state.pt").unlink(missing_ok=True)
    if all((work / f"{stage.name}.pt").exists() for stage in STAGES):
        torch.manual_seed(seed)
        models = HardModels()
        _load_finished(work, models, None, seed, scale)
        save_hard_vlm(output, models.llava, models.clip)


def _load_finished(work: Path, models: HardModels, until: Stage | None, seed: int, scale: float) -> None:
    """Load what earlier stages trained, in order; two that need nothing of one another may lack one."""
    for stage in STAGES:
        if until is not None and stage.name == until.name:
            return
        path = work / f"{stage.name}.pt"
        if path.exists():
            shortened = stage.scaled(scale)
            _load(path, models, shortened, seed)


def _train_stage(work: Path, models: HardModels, stage: Stage, seed: int, stop_after: int | None) -> int:
    """Train one stage from its start or from where it was left; return the steps taken."""
    path = work / f"{stage.name}.state.pt"
    optimizers = _optimizers(models, stage)
    start = 0
    if path.exists():
        state = _load(path, models, stage, seed)
        start = state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        print(f"resuming {stage.name} at step {start}", flush=True)
    began, taken = time.monotonic(), 0
    for step in range(start, stage.steps):
        numbers = _step(models, optimizers, stage, step)
        taken += 1
        if (step + 1) % PRINT_EVERY == 0 or step + 1 == stage.steps:
            speed = taken / (time.monotonic() - began)
            row = {"stage": stage.name, "step": step + 1, "of": stage.steps}
            row["eta_min"] = round((stage.steps - step - 1) / speed / 60, 1)
            row |= {name: round(value, 3) for name, value in numbers.items()}
            _log(work, row)
        if (step + 1) % SAVE_EVERY == 0 or taken == stop_after:
            _save(path, models, stage, seed, step + 1, optimizers)
        if taken == stop_after:
            break
    return taken


def _optimizers(models: HardModels, stage: Stage) -> list[torch.optim.Optimizer]:
    """Return Muon for matrices and AdamW for the rest: words, positions, kernels, read-outs, norms, biases."""
    models.requires_grad_(False)
    matrices, others = [], []
    for group, entries in trained(models, stage).items():
        factor = stage.tower if group == "tower" else 1.0
        for name, parameter in entries:
            parameter.requires_grad_(True)
            table = "embed" in name or name.startswith("heads.")
            if parameter.ndim == 2 and not table:
                matrices.append({"params": [parameter], "lr": stage.muon * factor, "peak": stage.muon * factor})
            else:
                others.append({"params": [parameter], "lr": stage.adam * factor, "peak": stage.adam * factor})
    return [
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", weight_decay=0.02),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _step(models: HardModels, optimizers: list[torch.optim.Optimizer], stage: Stage, step: int) -> dict[str, float]:
    warmup = min(1.0, (step + 1) / stage.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * stage.progress(step)))
    parameters: list[nn.Parameter] = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * warmup * (0.03 + 0.97 * cosine)
            parameters += group["params"]
    seeds = split_seeds("pretrain", stage.batch, stage.seeds_from + stage.batch * step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, numbers = stage_loss(models, stage, seeds, stage.progress(step))
    if not torch.isfinite(loss):
        raise RuntimeError(f"loss became {loss.item()} at step {step} of stage {stage.name}; the last state is kept")
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return {"loss": loss.item(), **numbers}


def _judge(work: Path, models: HardModels, stage: Stage, scale: float) -> None:
    """Log what the stage reached on validation scenes, and stop below its gate."""
    scenes = CHECKED if scale >= 1 else 4
    reached: dict[str, float] = {}
    for share in (1.0, 0.5) if stage.keep_low < 1 else (1.0,):
        reached = stage_accuracy(models, stage, split_seeds("validation", scenes), share)
        row = {"stage": stage.name, "validation_keep": share}
        row |= {name: round(value, 1) for name, value in reached.items()}
        _log(work, row)
        if share == 1 and scale >= 1:
            for name, bar in stage.gate.items():
                if reached[name] < bar:
                    raise RuntimeError(f"stage {stage.name} ended with {name} {reached[name]:.1f}, below its {bar}")


def _log(work: Path, row: dict) -> None:
    line = json.dumps(row)
    print(line, flush=True)
    with (work / "log.jsonl").open("a") as log:
        log.write(line + "\n")


def _save(
    path: Path,
    models: HardModels,
    stage: Stage,
    seed: int,
    step: int | None = None,
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> None:
    weights: dict[str, torch.Tensor] = {}
    for entries in trained(models, stage).values():
        weights |= {name: parameter.detach() for name, parameter in entries}
    state = {"weights": weights, "seed": seed, "stage": asdict(stage), "step": step}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    # A run killed while it writes must find the older state whole.
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _load(path: Path, models: HardModels, stage: Stage, seed: int) -> dict:
    """Load a stage's weights and return the rest of what was saved."""
    state = torch.load(path, weights_only=False)
    # A state of another seed or of other stages would go on as a run that nobody asked for.
    for name, wanted in {"seed": seed, "stage": asdict(stage)}.items():
        if state[name] != wanted:
            raise ValueError(
                f"{path} was written with {name}={state[name]}, this run has {wanted}; "
                "use another --work folder or delete the old one"
            )
    models.load_state_dict(state["weights"], strict=False)
    return state
