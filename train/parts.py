"""What a run is put together from: batches, their order, numbers, and what memory asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from prunetune.train.engine.engine import Engine
from prunetune.train.engine.layout import Share, StepSampler, check_budget
from prunetune.train.engine.lengths import pruned_lengths
from prunetune.train.float8 import use_float8
from prunetune.train.gpus import Gpu, gpu_of_device
from prunetune.train.held_out import HeldOutLoss
from prunetune.train.measured import RunNumbers
from prunetune.train.plan import needs_of, prediction, tokens_at_once
from prunetune.train.run import Run
from prunetune.train.sampling import train_sampler
from prunetune.train.shape import shape_of
from prunetune.train.tracking import Tracker
from prunetune.train.trainer import RecalibrationTrainer
from prunetune.train.workload import workload_of_data


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
            lengths = pruned_lengths(run.data, formatter, arm.pruned, config.max_length)
        check_budget(max(lengths), switches.token_budget)
    return StepSampler(train_sampler(run.data, config.sampling, share.group, config.seed), share, lengths)


def _gpu() -> Gpu | None:
    """Return the GPU that this process trains on; None on a CPU, and for one that nothing is known of."""
    return gpu_of_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def numbers_of(run: Run, arm: Arm) -> RunNumbers:
    """Return what measures the run, with the time that it is predicted to take."""
    steps, stop = run.steps - run.first_step, run.config.engine.stop_tower
    shape, predicted = None, None
    try:
        shape = shape_of(arm.model)
        predicted = prediction(run.config, arm.model, run.data, run.ranks.world, _gpu(), steps)
    # Advice, for any model that can be trained: one that can't be counted has a run without a prediction.
    except Exception as error:
        if run.ranks.is_zero:
            say(f"nothing is predicted of this run, and it goes on: {one_line(error)}")
    return RunNumbers(default_device(), shape, run.ranks.world, stop_tower=stop, predicted=predicted)


def checkpointing_of(run: Run, arm: Arm) -> bool:
    """Recompute the LLM's activations if that is asked for, or if memory asks for it, and return whether.

    Of the LLM alone: Trainer's own flag would also pull the frozen tower into the graph.
    """
    asked = run.config.engine.checkpointing
    if asked is False or (asked == "auto" and not _would_not_fit(run, arm)):
        return False
    recompute(arm)
    return True


def recompute(arm: Arm) -> None:
    """Recompute the LLM's activations in the backward pass."""
    language_model = getattr(arm.model.base_model, arm.pruned.family.language_model)
    language_model.activation_checkpointing_enable({"use_reentrant": False})
    language_model.train()


def _would_not_fit(run: Run, arm: Arm) -> bool:
    """Return whether the activations of a micro-batch would not fit the GPU; a CPU's memory is left to the user."""
    if not torch.cuda.is_available():
        return False
    load = workload_of_data(run.config, arm.model, run.data)
    needs = needs_of(run.config, shape_of(arm.model), load, run.ranks.world)
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
    trainer: Callable[[], RecalibrationTrainer],
) -> list[HeldOutCallback]:
    """Return what measures the held-out loss and keeps the best adapter; nothing if no samples are held out."""
    if run.held is None:
        return []
    config = run.config.train
    best = BestAdapter(run.config, run.data, run.held, arm, peft_model, tracker, made_with.get("features"))
    loss = HeldOutLoss(run.held, formatter, lambda batch: trainer().summed_loss(batch), run.ranks, config.batch_size)
    log = tracker.log if tracker is not None else None
    progress = Progress.read(run.found.folder)

    def measure() -> float:
        return trainer().held_out_loss(loss)

    return [HeldOutCallback(measure, best, log, config.eval_steps, config.patience, progress)]


def told_of(run: Run, held: Sequence[HeldOutCallback]) -> dict[str, Any] | None:
    """Say how the held-out loss ended, and return what the record says of it; None if there is none."""
    for callback in held:
        if run.ranks.is_zero:
            say("\n".join(callback.lines()))
        return callback.best.record(callback.progress)
    return None


def round_frozen(run: Run, arm: Arm) -> None:
    """Put the LLM's frozen layers into float8, if that is asked for."""
    if not run.config.engine.float8:
        return
    rounded = use_float8(arm.model, device=default_device())
    if run.ranks.is_zero:
        say(f"float8    {rounded.line()}")
