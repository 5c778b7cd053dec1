"""What a run is put together from: batches, their order, numbers, and what memory asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from prunetune.configs import RecalibrateConfig
from prunetune.data_recipes import Formatter, RecipeData
from prunetune.models import Arm
from prunetune.models.arm import default_device
from prunetune.models.features import FeatureData, FeatureFormatter, FeatureStore
from prunetune.models.ranks import first_on_rank_zero
from prunetune.reading import one_line
from prunetune.screen import say
from prunetune.train.best import BestAdapter, HeldOutCallback, Progress
from prunetune.train.elastic import Draws, settings_of
from prunetune.train.engine.engine import Engine
from prunetune.train.engine.layout import Share, StepSampler, check_budget
from prunetune.train.engine.lengths import lengths_of_settings
from prunetune.train.float8 import use_float8
from prunetune.train.gpus import gpu_of_device
from prunetune.train.held_out import HeldOutLoss
from prunetune.train.measured import RunNumbers
from prunetune.train.objectives.aim import Aim
from prunetune.train.plan import needs_of, prediction, tokens_at_once
from prunetune.train.run import Run
from prunetune.train.sampling import train_sampler
from prunetune.train.shape import ModelShape, shape_of
from prunetune.train.tracking import Tracker
from prunetune.train.trainer import RecalibrationTrainer
from prunetune.train.workload import Workload, workload_of_data


def arm_of(config: RecalibrateConfig, device: str | None = None) -> Arm:
    """Return the model with its pruner, or with all of those that it trains for.

    Raises:
        CheckpointError, ConfigError, PruningError: for a model, settings or options that can't work.
    """
    settings = settings_of(config.pruning, config.elastic)  # a wrong one stops here, before gigabytes are read
    arm = Arm.load(config.model, config.pruning, device=device)
    return arm.elastic([setting.spec for setting in settings]) if settings else arm


def draws_of(config: RecalibrateConfig) -> Draws | None:
    """Return how settings are drawn; None where there is one alone."""
    settings = settings_of(config.pruning, config.elastic)
    return Draws(settings, config.elastic, config.train.seed) if settings else None


def formatter_of(config: RecalibrateConfig, arm: Arm, data: RecipeData | None) -> Formatter | FeatureFormatter:
    """Return what builds batches: of images, or of the features that a cache holds of them.

    Args:
        config: the run's.
        arm: the model, before PEFT or DeepSpeed have it.
        data: what it trains on; None where another rank looks whether a cache has all of it.

    Raises:
        FeatureError: for a cache of something else.
    """
    length = config.train.max_length
    if config.features is None:
        assert data is not None
        return arm.formatter(data.images, length, raw_pixels=True)
    of_recipe = None if data is None else FeatureData.of_recipe(data)
    return FeatureFormatter(FeatureStore.open(config.features, arm, of_recipe, trains=True), arm, length)


def sampler_of(run: Run, arm: Arm, formatter: Formatter | FeatureFormatter, engine: Engine) -> StepSampler:
    """Return what each update holds on this rank.

    Raises:
        ConfigError: for a token budget that is smaller than the longest sample.
    """
    config, switches = run.config.train, run.config.engine
    share = Share(
        run.ranks.rank,
        run.ranks.world,
        config.batch_size,
        config.accumulation,
        switches.token_budget,
        padded=not engine.choice.packing,
    )
    lengths = None
    if switches.token_budget is not None:
        with first_on_rank_zero(run.ranks):  # which keeps what it counts
            lengths = lengths_of_settings(run.data, formatter, arm.pruned, config.max_length)
        check_budget(max(max(own) for own in lengths), switches.token_budget)
    order = train_sampler(run.data, config.sampling, share.group, config.seed)
    return StepSampler(order, share, lengths, draws_of(run.config))


@dataclass(frozen=True)
class Expected:
    """What can be told of a run before it starts.

    Attributes:
        shape: the model's sizes; None of a model that can't be counted.
        load: what there is to process; None as well, and on a CPU, where nothing is made of it.
    """

    shape: ModelShape | None = None
    load: Workload | None = None


def expected_of(run: Run, arm: Arm) -> Expected:
    """Return what can be told of a run; a model or data that can't be counted is said, and trained on all the same."""
    try:
        shape = shape_of(arm.model)
        on_gpu = torch.cuda.is_available()
        return Expected(shape, workload_of_data(run.config, arm.model, run.data) if on_gpu else None)
    # Advice, for any model that can be trained, whatever its modules are.
    except Exception as error:
        _say_unpredicted(run, error)
        return Expected()


def numbers_of(run: Run, arm: Arm, expected: Expected) -> RunNumbers:
    """Return what measures the run, with the time that it is predicted to take."""
    predicted = None
    if expected.load is not None:
        gpu, steps = gpu_of_device(torch.cuda.get_device_name()), run.steps - run.first_step
        try:
            predicted = prediction(run.config, arm.model, expected.load, run.ranks.world, gpu, steps)
        except Exception as error:  # advice as well
            _say_unpredicted(run, error)
    stop = run.config.engine.stop_tower
    return RunNumbers(default_device(), expected.shape, run.ranks.world, stop_tower=stop, predicted=predicted)


def _say_unpredicted(run: Run, error: Exception) -> None:
    if run.ranks.is_zero:
        say(f"nothing is predicted of this run, and it goes on: {one_line(error)}")


def checkpointing_of(run: Run, arm: Arm, expected: Expected) -> bool:
    """Recompute the LLM's activations if that is asked for, or if memory asks for it, and return whether.

    Of the LLM alone: Trainer's own flag would also pull the frozen tower into the graph.
    """
    asked = run.config.engine.checkpointing
    if asked is False or (asked == "auto" and not _would_not_fit(run, expected)):
        return False
    recompute(arm)
    return True


def recompute(arm: Arm) -> None:
    """Recompute the LLM's activations in the backward pass."""
    language_model = arm.pruned.family.llm(arm.model)
    language_model.activation_checkpointing_enable({"use_reentrant": False})
    language_model.train()


def _would_not_fit(run: Run, expected: Expected) -> bool:
    """Return whether the activations of a micro-batch would not fit the GPU; a CPU's memory is left to the user."""
    shape, load = expected.shape, expected.load
    if shape is None or load is None:
        return False
    needs = needs_of(run.config, shape, load, run.ranks.world)
    memory = torch.cuda.get_device_properties(default_device()).total_memory
    tokens = tokens_at_once(run.config, load)
    if run.config.engine.token_budget is None:  # the longest samples may meet in a micro-batch
        tokens = max(tokens, run.config.train.batch_size * load.longest)
    return needs.needs_checkpointing(tokens, memory)


def held_out_of(
    run: Run,
    arm: Arm,
    peft_model: PeftModel,
    formatter: Formatter | FeatureFormatter,
    tracker: Tracker | None,
    made_with: dict[str, Any],
    aim: Aim,
    trainer: Callable[[], RecalibrationTrainer],
) -> HeldOutCallback | None:
    """Return what measures the held-out loss and keeps the best adapter; None if no samples are held out."""
    if run.held is None:
        return None
    config = run.config.train
    best = BestAdapter(
        run.config,
        run.data,
        run.held,
        arm,
        peft_model,
        tracker,
        made_with.get("features"),
        run.begins,
        aim.held_out_told(),
    )
    loss = HeldOutLoss(
        run.held,
        formatter,
        lambda batch: trainer().held_out_sums(batch),
        run.ranks,
        config.batch_size,
        aim.held_out_counts,
    )
    log = tracker.log if tracker is not None else None
    progress = Progress.read(run.found.folder)

    def measure() -> float:
        return trainer().held_out_loss(loss)

    return HeldOutCallback(measure, best, log, config.eval_steps, config.patience, progress)


def told_of(run: Run, held: HeldOutCallback | None) -> dict[str, Any] | None:
    """Say how the held-out loss ended, and return what the record says of it; None if there is none."""
    if held is None:
        return None
    if run.ranks.is_zero:
        say("\n".join(held.lines()))
    return held.best.record(held.progress)


def round_frozen(run: Run, arm: Arm) -> None:
    """Put the LLM's frozen layers into float8, if that is asked for."""
    if not run.config.engine.float8:
        return
    rounded = use_float8(arm.model, device=default_device())
    if run.ranks.is_zero:
        say(f"float8    {rounded.line()}")
