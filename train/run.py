"""What a recalibration starts from: its options, its data, and the checkpoint to go on from."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.utils import logging as transformers_logging

from prunetune.configs import RecalibrateConfig
from prunetune.configs.schema import ObjectiveConfig
from prunetune.data_recipes import RecipeData, load_recipe
from prunetune.models.arm import default_device
from prunetune.models.profile import resolved
from prunetune.models.ranks import Ranks, launched_ranks
from prunetune.train.checkpoints import Found, find_checkpoint, finished_step, set_aside
from prunetune.train.elastic import settings_of
from prunetune.train.float8 import check_float8_device
from prunetune.train.held_out import split
from prunetune.train.sampling import steps_in_total
from prunetune.train.start_from import Start
from prunetune.train.trainer import use_plain_collectives_on_cpu


@dataclass(frozen=True)
class Run:
    """What a recalibration starts from.

    Attributes:
        config: the run's.
        data: what it trains on.
        held: what the held-out loss is measured on; None measures none.
        ranks: this process among the others.
        settings: what must not change between a run and its continuation.
        found: the checkpoint to go on from.
        finished: the last step of a run that has nothing left to do; None for any other.
        begins: the adapter whose projector training begins with; None begins with the base's.
    """

    config: RecalibrateConfig
    data: RecipeData
    held: RecipeData | None
    ranks: Ranks
    settings: dict[str, Any]
    found: Found
    finished: int | None
    begins: Start | None = None

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(self.config.output)

    @property
    def first_step(self) -> int:
        """The step to go on from."""
        return self.found.mark.step if self.found.mark is not None else 0

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return steps_in_total(self.config.train, len(self.data), self.ranks.world)


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
    settings_of(config.pruning, config.elastic)
    resolved(config.pruning).build()  # a wrong name or option stops here, before anything is loaded
    data = load_recipe(config.data.recipe, **config.data.model_dump(exclude={"recipe"}))
    held = None
    if config.train.held_out:
        data, held = split(data, config.train.held_out, config.data.seed or 0)
    if config.engine.float8:
        check_float8_device(default_device())
    begins = Start.of(config.train.start_from)
    settings = _settings(config, data, ranks.world, begins)
    output = Path(config.output)
    found, finished = Found(), None
    if config.overwrite:
        pass  # rank 0 has deleted the checkpoints, or is about to
    elif config.train.resume == "auto":
        finished = finished_step(output, settings)
    elif ranks.is_zero:
        set_aside(output)
    if config.train.resume == "auto" and finished is None and not config.overwrite:
        found = find_checkpoint(output, settings)
    return Run(config, data, held, ranks, settings, found, finished, begins)


def _settings(config: RecalibrateConfig, data: RecipeData, world: int, begins: Start | None = None) -> dict[str, Any]:
    """Return what must not change between a run and its continuation."""
    train = config.train.model_dump(exclude={"save_steps", "log_steps", "workers", "resume", "start_from"})
    settings: dict[str, Any] = {
        "model": config.model.model_dump(),
        "pruning": resolved(config.pruning).model_dump(),  # a profile that was written anew is another pruning
        "data": data.content_hash,
        "train": train,
        "engine": config.engine.model_dump(),
        "ranks": world,
    }
    # Named where they are used alone: checkpoints of before there were any stay usable.
    if begins is not None:
        settings["train.start_from"] = begins.projector_hash  # wherever the folder is
    if config.elastic.on:
        settings["elastic"] = config.elastic.model_dump()
    if config.objective != ObjectiveConfig():
        settings["objective"] = config.objective.model_dump()
    return settings
