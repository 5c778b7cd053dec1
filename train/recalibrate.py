"""Recalibrate a projector: ``deepspeed --num_gpus 8 train/recalibrate.py --config FILE [--section.field value]``."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
from peft import PeftModel
from transformers import TrainerCallback

from prunetune.configs import ConfigError, RecalibrateConfig, load_config, to_yaml
from prunetune.configs.schema import ObjectiveConfig
from prunetune.data_recipes import DataError, Formatter
from prunetune.errors import PrunetuneError
from prunetune.models import Arm, write_adapter
from prunetune.models.code import code_record
from prunetune.models.features import FeatureFormatter, FeatureStore
from prunetune.models.profile import resolved
from prunetune.models.ranks import Ranks, launched_ranks
from prunetune.models.record import told_stages
from prunetune.models.seal import SEAL
from prunetune.outputs import RECALIBRATION, OutputFolder, write_text, writing
from prunetune.plugins import PluginError, plugin_records
from prunetune.pruning import PruningSpec
from prunetune.screen import SCREEN, say
from prunetune.train.callbacks import (
    CompleteCheckpointCallback,
    NothingToTrain,
    NumbersCallback,
    StopCallback,
    check_finite_weights,
)
from prunetune.train.checkpoints import (
    CODE,
    check_made_with,
    mark_finished,
    other_code,
    rename_damaged,
)
from prunetune.train.deepspeed_settings import zero_stage
from prunetune.train.elastic import settings_of, told
from prunetune.train.ema import MeanCallback, RunningMean
from prunetune.train.freeze import FrozenReport, freeze_all_but_projector, wrapped
from prunetune.train.launchers import complete_environment
from prunetune.train.masters import StartCallback, gathered_projector
from prunetune.train.measured import inside_of_log
from prunetune.train.objectives.aim import Aim
from prunetune.train.objectives.objective import Objective
from prunetune.train.objectives.start import aim_of
from prunetune.train.objectives.stored import read_index
from prunetune.train.parts import (
    arm_of,
    checkpointing_of,
    expected_of,
    formatter_of,
    held_out_of,
    numbers_of,
    round_frozen,
    sampler_of,
    told_of,
)
from prunetune.train.preflight import check_before_launch
from prunetune.train.record import run_record
from prunetune.train.rotation import KeepNewestCallback
from prunetune.train.run import Run, start
from prunetune.train.sampling import samples_per_step
from prunetune.train.stopping import REQUEUE, StopRequest
from prunetune.train.tracking import Tracker
from prunetune.train.trainer import (
    PATIENCE,
    RecalibrationTrainer,
    drop_frozen_from_state_dict,
    frozen_tensors_hash,
    training_arguments,
)


@dataclass(frozen=True)
class Trained:
    """How training ended.

    Attributes:
        step: the last one.
        stopped: whether a signal ended it; there is a checkpoint of that step.
        skipped: float16 steps that DeepSpeed left out because their gradients overflowed; None in other dtypes.
        held_out: what the record says of the held-out loss; None if there is none.
    """

    step: int
    stopped: bool
    skipped: int | None
    held_out: dict[str, Any] | None = None


@dataclass(frozen=True)
class Weights:
    """What a run begins with and keeps of the weights beside training them.

    Attributes:
        begin: gives them all digits of an adapter's; None where training begins with the base's.
        mean: their running mean; None keeps none.
    """

    begin: StartCallback | None
    mean: RunningMean | None

    @classmethod
    def of(cls, run: Run, arm: Arm, peft_model: PeftModel) -> Weights:
        """Put what training begins with into the model, before DeepSpeed has it."""
        begin = None
        if run.begins is not None:
            begin = StartCallback(peft_model, run.begins.load(peft_model, arm.base.hashes))
        decay = run.config.train.ema
        return cls(begin, None if decay is None else RunningMean(peft_model, decay))

    def callbacks(self) -> list[TrainerCallback]:
        """Return what has to come before anything looks at the weights."""
        mean = None if self.mean is None else MeanCallback(self.mean)
        return [callback for callback in (self.begin, mean) if callback is not None]


def recalibrate(run: Run, request: StopRequest | None = None) -> Path | None:
    """Train the projector on pruned inputs and return the folder of the finished adapter; every rank calls this.

    Args:
        run: made by :func:`start`.
        request: whether to stop early; None if nobody may ask.

    Returns:
        None if it was stopped: the run goes on when it is started again.

    Raises:
        ConfigError, PruningError, DataError: for checkpoints or data that can't work.
        FloatingPointError: if the loss or a weight is no number.
        RuntimeError: if a frozen weight changed.
    """
    config = run.config
    # The model is built before TrainingArguments: an active ZeRO-3 configuration would partition it while loading.
    # DeepSpeed takes plain weights to the GPU; quantised ones are made there.
    arm = arm_of(config, device="cpu" if config.model.quantization is None else None)
    made_with = _made_with(run, arm) if run.ranks.is_zero else {}
    check_made_with(run.found, made_with)
    if run.ranks.is_zero and (changed := other_code(run.found, made_with)):
        say(changed)
    tracker = Tracker(config.tracking, run.output, config.model_dump(), run.first_step) if run.ranks.is_zero else None
    # One rank looks whether a cache of features has all samples.
    looked = run.data if run.config.features is None or run.ranks.is_zero else None
    formatter = formatter_of(config, arm, looked)
    # Before PEFT has the model: the teacher shares its weights, and has the original projector.
    aim = aim_of(config, arm, formatter, run.data, zero_stage(config.train.deepspeed) == 3)
    peft_model = wrapped(arm.model, config.train)
    announce(run, freeze_all_but_projector(peft_model))
    weights = Weights.of(run, arm, peft_model)
    trained = train(run, arm, peft_model, formatter, tracker, request or StopRequest(), made_with, aim, weights)
    if not trained.stopped:
        save(run, arm, peft_model, tracker, trained, made_with, weights.mean)
    elif run.ranks.is_zero:
        say(f"stopped by a signal after step {trained.step} of {run.steps}; the same command goes on from there")
    if tracker is not None:
        tracker.close()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return None if trained.stopped else run.output / "adapter"


def train(
    run: Run,
    arm: Arm,
    peft_model: PeftModel,
    formatter: Formatter | FeatureFormatter,
    tracker: Tracker | None,
    request: StopRequest,
    made_with: dict[str, Any],
    aim: Aim,
    weights: Weights,
) -> Trained:
    """Train with the pruner attached, check that nothing frozen changed, and say how it ended."""
    config = run.config.train
    engine = aim.engine
    expected = expected_of(run, arm)
    recomputed = checkpointing_of(run, arm, expected)
    if run.ranks.is_zero:
        say("\n".join([*engine.lines(), f"          {'with' if recomputed else 'no'} gradient checkpointing"]))
    if aim.anchor is not None:
        aim.anchor.hold(peft_model)
    half = run.config.model.dtype == "float16"
    engine.numbers = numbers_of(run, arm, expected)
    round_frozen(run, arm)  # after the numbers have read the model's sizes off its layers
    numbers = NumbersCallback(
        tracker,
        samples_per_step(config, run.ranks.world),
        skips=(lambda: trainer.skipped_steps) if half else None,
        measured=engine.numbers,
    )
    stop = StopCallback(request, run.steps)
    held = held_out_of(run, arm, peft_model, formatter, tracker, made_with, aim, lambda: trainer, weights.mean)
    mark = CompleteCheckpointCallback(run.settings, made_with)
    settings = training_arguments(run.config, run.output, run.steps)  # the ranks meet in it
    trainer = RecalibrationTrainer(
        formatter,
        run.data,
        sampler_of(run, arm, formatter, engine),
        aim,
        config.loss,
        model=peft_model,
        args=settings,
        callbacks=[*weights.callbacks(), *([] if held is None else [held]), stop, numbers, mark, KeepNewestCallback()],
    )
    run.ranks.check_same(plugin_records())
    _check_same_start(run)
    before = frozen_tensors_hash(peft_model)
    drop_frozen_from_state_dict(peft_model)
    with aim.attached(settings.device):
        take_steps(trainer, run.found.folder)
    trainer.end_loading()
    if frozen_tensors_hash(peft_model) != before:
        raise RuntimeError("a frozen weight changed during training; the adapter is not written. Please report this")
    lost = trainer.unsupervised_samples()
    if lost and run.ranks.is_zero and aim.objective.reads_answers:
        say(f"{lost} samples lost every answer token to max_length={config.max_length} and added no loss")
    if numbers.skipped and run.ranks.is_zero:
        say(f"{numbers.skipped} steps were skipped: their float16 gradients overflowed, and the loss scale was lowered")
    skipped = numbers.skipped if half else None
    return Trained(trainer.state.global_step, stop.stopped, skipped, told_of(run, held))


def take_steps(trainer: RecalibrationTrainer, resume: Path | None) -> None:
    """Train, from a checkpoint if there is one.

    Raises:
        FloatingPointError: also if DeepSpeed's loss scale can't fall further.
        DataError: if a data loading process is stuck.
    """
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
    except NothingToTrain:
        pass
    except Exception as error:
        _say_why(error, trainer)
        raise


def _say_why(error: Exception, trainer: RecalibrationTrainer) -> None:
    """Raise an error of ours for those of libraries that have no type and are nobody's mistake in the code."""
    kept = f"the last checkpoint in {trainer.args.output_dir} is untouched"
    if "loss scale already at minimum" in str(error):
        raise FloatingPointError(
            f"the float16 gradients overflow at every loss scale at step {trainer.state.global_step + 1}; {kept}. "
            "Use bfloat16 or float32, or lower train.learning_rate"
        ) from error
    if "DataLoader timed out" in str(error):
        raise DataError(
            f"the data loading processes gave no batch for {PATIENCE} s at step {trainer.state.global_step + 1}; "
            f"{kept}. See whether the images can be read; the same command goes on, and train.workers 0 loads "
            "without processes"
        ) from error


def save(
    run: Run,
    arm: Arm,
    peft_model: PeftModel,
    tracker: Tracker | None,
    trained: Trained,
    made_with: dict[str, Any],
    mean: RunningMean | None = None,
) -> None:
    """Write the adapter with its record, and say that the run has finished."""
    check_finite_weights(peft_model)
    tensors = gathered_projector(peft_model) if mean is None else mean.projector()
    if not run.ranks.is_zero:
        return
    record = run_record(run.config, run.data, arm, tensors, trained.step, tracker, made_with["features"], run.begins)
    if (stored := record["stored_in"]) != "float32":
        say(f"train.deepspeed {run.config.train.deepspeed} keeps no float32 weights: the adapter is stored in {stored}")
    if trained.skipped is not None:
        record["skipped_steps"] = trained.skipped
    if trained.held_out is not None:
        record["held_out"] = trained.held_out
    inside = None if tracker is None else inside_of_log(tracker.path)
    if inside is not None:
        record["llm_tokens"] = inside
    write_adapter(run.output / "adapter", tensors, peft_model, record)
    if tracker is not None:
        hashes = {name: value for name, value in record.items() if name.endswith("_hash")}
        tracker.note({"hashes": hashes})
        tracker.log_adapter(run.output / "adapter", {"pruning": record["pruning"], **hashes})
    mark_finished(run.output, trained.step, run.settings, made_with)
    say(f"recalibrated projector: {run.output / 'adapter'}")


def _pruning_lines(pruning: PruningSpec) -> list[str]:
    chosen = "" if pruning.choose_with == "tuned" else f", chosen by the {pruning.choose_with} projector"
    lines = []
    if pruning.pruner != "identity" or not pruning.stages:
        lines.append(f"pruning   {pruning.pruner}, keep {pruning.keep} {pruning.options or ''}{chosen}")
    return lines + [f"pruning   {stage}, inside the LLM" for stage in told_stages(pruning.model_dump())]


def _made_with(run: Run, arm: Arm) -> dict[str, Any]:
    """Return what else a run's numbers come from, as checkpoints hold it."""
    teacher = {}
    if run.config.objective.teacher is not None:
        teacher = {"teacher": read_index(Path(run.config.objective.teacher))[SEAL]}
    return {
        **teacher,
        "base model": arm.base.hashes.frozen_hash,
        "original projector": arm.base.hashes.original_projector_hash,
        "tokenizer, processor or configuration": arm.base.settings_hash,
        "text tower": arm.text_tower_hash,
        "features": None if run.config.features is None else FeatureStore(run.config.features).seal,
        "plug-ins": plugin_records(),
        CODE: code_record(),
    }


def _check_same_start(run: Run) -> None:
    """Check that all ranks go on from the same step; then checkpoints that can't be used get another name.

    Raises:
        ConfigError: on every rank.
    """
    if run.ranks.world > 1:
        steps: list[Any] = [None] * run.ranks.world
        torch.distributed.all_gather_object(steps, run.first_step)
        if len(set(steps)) > 1:
            raise ConfigError(f"the ranks see other checkpoints in {run.output}: they would go on from steps {steps}")
    if run.ranks.is_zero:
        rename_damaged(run.found)


def announce(run: Run, report: FrozenReport) -> None:
    """Print what will happen, and keep the effective configuration."""
    if not run.ranks.is_zero:
        return
    config, data = run.config, run.data
    # Without the word: who goes on with this file should not delete what there is.
    write_text(run.output / "config.yaml", to_yaml(config.model_copy(update={"overwrite": False})))
    sources = ", ".join(f"{name} {count:,}" for name, count in data.counts.items())
    lines = [f"model     {config.model.path} ({config.model.dtype})"]
    if run.begins is not None:
        lines.append(f"begins    with the projector of {run.begins.line()}")
    lines += _pruning_lines(resolved(config.pruning))
    if settings := settings_of(config.pruning, config.elastic):
        lines.append(f"elastic   {told(settings)}")
    if config.objective != ObjectiveConfig():
        lines.append(f"towards   {Objective(config.objective).told()}")
    lines.append(f"data      {data.name}: {len(data):,} samples ({sources})")
    if data.broken:
        lines.append(f"          {len(data.broken)} records left out, they are no conversation: {data.broken[:3]}")
    if data.missing:
        lines.append(f"          {len(data.missing)} samples left out, their image is missing: {data.missing[:3]}")
    if run.held is not None:
        every = config.train.eval_steps
        lines.append(f"          {len(run.held):,} samples held out, a loss on them every {every} steps")
    lines += [
        f"ranks     {run.ranks.world}, {config.train.batch_size} samples each, "
        f"DeepSpeed {deepspeed.__version__} {config.train.deepspeed}",
        *report.lines(),
    ]
    for folder, reason in run.found.damaged.items():
        lines.append(f"{folder} is skipped and renamed: {reason}")
    if run.found.folder is not None:
        lines.append(f"resuming from {run.found.folder}")
    say("\n".join(lines))


def main(arguments: list[str]) -> None:
    """Read ``--config`` and overrides and recalibrate; errors of the user's making end without a traceback."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--local_rank")  # the launcher adds it
    parser.add_argument("--marked", action="store_true")  # `prunetune recalibrate` adds it, see prunetune.screen
    options, overrides = parser.parse_known_args(arguments)
    SCREEN.marked = options.marked
    complete_environment()
    ranks = launched_ranks()
    request = StopRequest()
    request.listen()
    with ExitStack() as stack:
        adapter = _main(options, overrides, ranks, request, stack)
    request.finish()
    if adapter is None:
        sys.exit(REQUEUE)


def _main(
    options: argparse.Namespace, overrides: list[str], ranks: Ranks, request: StopRequest, stack: ExitStack
) -> Path | None:
    """Return the adapter's folder; None if a signal stopped the run."""
    try:
        config = load_config(RecalibrateConfig, options.config, overrides)
        if not options.marked:
            check_before_launch(config)
        if ranks.is_zero:
            stack.enter_context(OutputFolder(config.output, RECALIBRATION, config.overwrite, (config.model.path,)))
        run = start(config)
    except PrunetuneError as error:
        # All ranks fail alike and one says why; a plug-in may be missing on one host alone, which then says so itself.
        if ranks.is_zero or isinstance(error, PluginError):
            _fail(ranks, error)
        sys.exit(1)
    if run.finished is not None:
        if ranks.is_zero:
            say(f"this run has finished: step {run.finished}, adapter {run.output / 'adapter'}; nothing is done")
        return run.output / "adapter"
    try:
        with writing(run.output):
            return recalibrate(run, request)
    except (PrunetuneError, FloatingPointError) as error:
        _fail(ranks, error)


def _fail(ranks: Ranks, error: Exception) -> NoReturn:
    where = "" if ranks.is_zero else f" (rank {ranks.rank})"
    print(f"error{where}: {error}", file=SCREEN, flush=True)
    sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
