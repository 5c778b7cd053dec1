"""Recalibrate a projector: ``deepspeed --num_gpus 8 train/recalibrate.py --config FILE [--section.field value]``."""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
from peft import PeftModel
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from prunetune.configs import RecalibrateConfig, load_config, to_yaml
from prunetune.data_recipes import RecipeData, load_recipe
from prunetune.errors import PrunetuneError
from prunetune.models import Arm, wrap_projector, write_adapter
from prunetune.models.ranks import Ranks, launched_ranks
from prunetune.plugins import PluginError, plugin_records
from prunetune.screen import SCREEN, say
from prunetune.train.callbacks import CompleteCheckpointCallback, NumbersCallback, check_finite_weights
from prunetune.train.freeze import FrozenReport, freeze_all_but_projector
from prunetune.train.record import run_record
from prunetune.train.sampling import train_sampler
from prunetune.train.tracking import Tracker
from prunetune.train.trainer import (
    RecalibrationTrainer,
    drop_frozen_from_state_dict,
    frozen_tensors_hash,
    gathered_projector,
    last_complete_checkpoint,
    set_aside,
    steps_in_total,
    training_arguments,
    use_plain_collectives_on_cpu,
)


@dataclass(frozen=True)
class Run:
    """What a recalibration starts from: the configuration, the data, this rank, and a checkpoint to go on from."""

    config: RecalibrateConfig
    data: RecipeData
    ranks: Ranks
    settings: dict[str, Any]
    resume: Path | None

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(self.config.output)

    @property
    def first_step(self) -> int:
        """The step to go on from."""
        return int(self.resume.name.split("-")[1]) if self.resume is not None else 0


def recalibrate(run: Run) -> Path:
    """Train the projector on pruned inputs and return the folder of the finished adapter; every rank calls this.

    Raises:
        ConfigError, PruningError, DataError: for checkpoints or data that can't work.
        FloatingPointError: if the loss or a weight is no number.
        RuntimeError: if a frozen weight changed.
    """
    config = run.config
    tracker = Tracker(config.tracking, run.output, config.model_dump(), run.first_step) if run.ranks.is_zero else None
    # The model is built before TrainingArguments: an active ZeRO-3 configuration would partition it while loading.
    arm = Arm.load(config.model, config.pruning, device="cpu")
    peft_model = wrap_projector(arm.model, config.train.trainable)
    announce(run, freeze_all_but_projector(peft_model))
    step = train(run, arm, peft_model, tracker)
    save(run, arm, peft_model, tracker, step)
    if tracker is not None:
        tracker.close()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return run.output / "adapter"


def start(config: RecalibrateConfig) -> Run:
    """Check the options, read the data, and look for a complete checkpoint to go on from.

    Raises:
        ConfigError, PruningError, DataError: for options or data that can't work; the same on every rank.
    """
    ranks = launched_ranks()
    set_seed(config.train.seed)
    use_plain_collectives_on_cpu()
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' about one another
    if not ranks.is_zero:
        transformers_logging.set_verbosity_error()
    config.pruning.build()  # a wrong name or option stops here, before anything is loaded
    data = load_recipe(config.data.recipe, **config.data.model_dump(exclude={"recipe"}))
    settings = _settings(config, data, ranks.world)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    resume = None
    if config.train.resume == "auto":
        resume = last_complete_checkpoint(output, settings)
    elif ranks.is_zero:
        set_aside(output)
    return Run(config, data, ranks, settings, resume)


def train(run: Run, arm: Arm, peft_model: PeftModel, tracker: Tracker | None) -> int:
    """Train with the pruner attached, check that nothing frozen changed, and return the last step's number."""
    config = run.config.train
    if config.gradient_checkpointing:
        _checkpoint_language_model(arm)
    steps = steps_in_total(config, len(run.data), run.ranks.world)
    numbers = NumbersCallback(tracker, config.batch_size * config.accumulation * run.ranks.world)
    trainer = RecalibrationTrainer(
        arm.formatter(run.data.images, config.max_length),
        run.data,
        train_sampler(run.data, config.sampling, config.batch_size * run.ranks.world, config.seed),
        model=peft_model,
        args=training_arguments(run.config, run.output, steps),
        callbacks=[numbers, CompleteCheckpointCallback(run.settings)],
    )
    run.ranks.check_same(plugin_records())
    before = frozen_tensors_hash(peft_model)
    drop_frozen_from_state_dict(peft_model)
    with arm.pruned.attach(packed=config.packing):
        trainer.train(resume_from_checkpoint=str(run.resume) if run.resume else None)
    if frozen_tensors_hash(peft_model) != before:
        raise RuntimeError("a frozen weight changed during training; the adapter is not written. Please report this")
    lost = trainer.unsupervised_samples()
    if lost and run.ranks.is_zero:
        say(f"{lost} samples lost every answer token to max_length={config.max_length} and added no loss")
    return trainer.state.global_step


def save(run: Run, arm: Arm, peft_model: PeftModel, tracker: Tracker | None, step: int) -> None:
    """Write the adapter with its record."""
    check_finite_weights(peft_model)
    tensors = gathered_projector(peft_model)
    if not run.ranks.is_zero:
        return
    record = run_record(run.config, run.data, arm, tensors, step, tracker)
    write_adapter(run.output / "adapter", tensors, peft_model, record)
    say(f"recalibrated projector: {run.output / 'adapter'}")


def _settings(config: RecalibrateConfig, data: RecipeData, world: int) -> dict[str, Any]:
    """Return what must not change between a run and its continuation."""
    train = config.train.model_dump(exclude={"save_steps", "log_steps", "workers", "resume"})
    return {
        "model": config.model.model_dump(),
        "pruning": config.pruning.model_dump(),
        "data": data.content_hash,
        "train": train,
        "ranks": world,
    }


def _checkpoint_language_model(arm: Arm) -> None:
    """Recompute activations in the LLM only: Trainer's own flag would also pull the frozen tower into the graph."""
    language_model = getattr(arm.model.base_model, arm.pruned.family.language_model)
    language_model.activation_checkpointing_enable({"use_reentrant": False})
    language_model.train()


def announce(run: Run, report: FrozenReport) -> None:
    """Print what will happen, and keep the effective configuration."""
    if not run.ranks.is_zero:
        return
    config, data = run.config, run.data
    (run.output / "config.yaml").write_text(to_yaml(config))
    sources = ", ".join(f"{name} {count:,}" for name, count in data.counts.items())
    lines = [
        f"model     {config.model.path} ({config.model.dtype})",
        f"pruning   {config.pruning.pruner}, keep {config.pruning.keep} {config.pruning.options or ''}",
        f"data      {data.name}: {len(data):,} samples ({sources})",
        f"ranks     {run.ranks.world}, {config.train.batch_size} samples each, "
        f"DeepSpeed {deepspeed.__version__} {config.train.deepspeed}",
        *report.lines(),
    ]
    if data.missing:
        lines.insert(3, f"          {len(data.missing)} samples left out, their image is missing: {data.missing[:3]}")
    if run.resume is not None:
        lines.append(f"resuming from {run.resume}")
    say("\n".join(lines))


def main(arguments: list[str]) -> None:
    """Read ``--config`` and overrides and recalibrate; errors of the user's making end without a traceback."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--local_rank")  # the launcher adds it
    parser.add_argument("--marked", action="store_true")  # `prunetune recalibrate` adds it, see prunetune.screen
    options, overrides = parser.parse_known_args(arguments)
    SCREEN.marked = options.marked
    ranks = launched_ranks()
    try:
        run = start(load_config(RecalibrateConfig, options.config, overrides))
    except PrunetuneError as error:
        # All ranks fail alike and one says why; a plug-in may be missing on one host alone, which then says so itself.
        if ranks.is_zero or isinstance(error, PluginError):
            _fail(ranks, error)
        sys.exit(1)
    try:
        recalibrate(run)
    except (PrunetuneError, FloatingPointError) as error:
        _fail(ranks, error)


def _fail(ranks: Ranks, error: Exception) -> NoReturn:
    where = "" if ranks.is_zero else f" (rank {ranks.rank})"
    print(f"error{where}: {error}", file=SCREEN, flush=True)
    sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
