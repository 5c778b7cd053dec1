"""Recalibrate a projector: ``deepspeed --num_gpus 8 train/recalibrate.py --config FILE [--section.field value]``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the launcher starts this file by its path; imports count from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import deepspeed
import torch
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from configs import ConfigError, RecalibrateConfig, load_config, to_yaml
from data_recipes import DataError, Formatter, RecipeData, load_recipe
from pruning import PrunedModel, PruningError, PruningSpec
from pruning.checkpoint import checkpoint_folder, load_model, wrap_projector, write_adapter
from pruning.checkpoint import frozen_hash as stored_hash
from pruning.families import family_of
from train.callbacks import CompleteCheckpointCallback, NumbersCallback
from train.freeze import freeze_all_but_projector
from train.record import run_record
from train.tracking import Tracker
from train.trainer import (
    RecalibrationTrainer,
    drop_frozen_from_state_dict,
    frozen_hash,
    gathered_projector,
    last_complete_checkpoint,
    steps_in_total,
    training_arguments,
)


def recalibrate(config: RecalibrateConfig) -> Path:
    """Train the projector on pruned inputs and return the folder of the finished adapter.

    Every rank calls this. A run that was killed goes on from its last complete checkpoint.

    Raises:
        ConfigError, PruningError, DataError: for options, checkpoints or data that can't work.
        RuntimeError: if a frozen weight changed.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chief, output = rank == 0, Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    set_seed(config.train.seed)
    if not chief:
        transformers_logging.set_verbosity_error()

    spec = PruningSpec(**config.pruning.model_dump())
    spec.build()  # a wrong name or option stops here, before anything is loaded
    data = load_recipe(config.data.recipe, **config.data.model_dump(exclude={"recipe"}))
    settings = _settings(config, data, world)
    resume = last_complete_checkpoint(output, settings) if config.train.resume == "auto" else None
    tracker = Tracker(config.tracking, output, config.model_dump()) if chief else None

    # The model is built before TrainingArguments: an active ZeRO-3 configuration would partition it while loading.
    model, processor = load_model(config.model.path, config.model.revision, config.model.dtype, config.model.attention)
    peft_model = wrap_projector(model, config.train.trainable)
    report = freeze_all_but_projector(peft_model)
    formatter = Formatter(processor, data.images, config.model.template, config.model.square, config.train.max_length)
    if config.train.gradient_checkpointing:
        _checkpoint_language_model(model)
    if chief:
        (output / "config.yaml").write_text(to_yaml(config))
        print(_summary(config, data, report.lines(), world, resume), flush=True)

    pruned = PrunedModel(model, spec)
    steps = steps_in_total(config.train, len(data), world)
    numbers = NumbersCallback(tracker, config.train.batch_size * config.train.accumulation * world)
    trainer = RecalibrationTrainer(
        pruned, formatter, data,
        model=peft_model,
        args=training_arguments(config, output, steps),
        callbacks=[numbers, CompleteCheckpointCallback(settings)],
    )  # fmt: skip
    before = frozen_hash(peft_model)
    drop_frozen_from_state_dict(peft_model)
    with pruned.attach():
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if frozen_hash(peft_model) != before:
        raise RuntimeError("a frozen weight changed during training; the adapter is not written. Please report this")

    tensors = gathered_projector(peft_model)
    if chief:
        base = stored_hash(checkpoint_folder(config.model.path, config.model.revision), family_of(model).projectors)
        record = run_record(config, data, base, tensors, trainer.state.global_step, tracker)
        write_adapter(output / "adapter", tensors, peft_model, record)
        _report_unsupervised(formatter)
        print(f"recalibrated projector: {output / 'adapter'}", flush=True)
    if tracker is not None:
        tracker.close()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return output / "adapter"


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


def _checkpoint_language_model(model: Any) -> None:
    """Recompute activations in the LLM only: Trainer's own flag would also pull the frozen tower into the graph."""
    family = family_of(model)
    language_model = getattr(model.base_model, family.language_model)
    language_model.activation_checkpointing_enable({"use_reentrant": False})
    language_model.train()


def _summary(config: RecalibrateConfig, data: RecipeData, freeze: list[str], world: int, resume: Path | None) -> str:
    sources = ", ".join(f"{name} {count:,}" for name, count in data.counts.items())
    lines = [
        f"model     {config.model.path} ({config.model.dtype})",
        f"pruning   {config.pruning.pruner}, keep {config.pruning.keep} {config.pruning.options or ''}",
        f"data      {data.name}: {len(data):,} samples ({sources})",
        f"ranks     {world}, {config.train.batch_size} samples each, DeepSpeed {config.train.deepspeed} "
        f"{deepspeed.__version__}",
        *freeze,
    ]
    if data.missing:
        lines.insert(3, f"          {len(data.missing)} samples left out, their image is missing: {data.missing[:3]}")
    if resume is not None:
        lines.append(f"resuming from {resume}")
    return "\n".join(lines)


def _report_unsupervised(formatter: Formatter) -> None:
    if formatter.unsupervised:
        print(
            f"{len(formatter.unsupervised)} samples lost every answer token to max_length and added no loss, first "
            f"{formatter.unsupervised[:3]}",
            flush=True,
        )


def main(arguments: list[str]) -> None:
    """Read ``--config`` and overrides and recalibrate; errors of the user's making end without a traceback."""
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    file = None
    if "--config" in arguments:
        at = arguments.index("--config")
        file = arguments[at + 1] if at + 1 < len(arguments) else None
        arguments = arguments[:at] + arguments[at + 2 :]
    try:
        recalibrate(load_config(RecalibrateConfig, file, arguments))
    except (ConfigError, PruningError, DataError, FloatingPointError) as error:
        sys.exit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
