"""What can be known to be wrong before any rank starts; nothing here imports DeepSpeed or reads weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from prunetune.configs import ConfigError, RecalibrateConfig, TrackingConfig
from prunetune.data_recipes.formats import LlavaJsonRecipe
from prunetune.data_recipes.llava_json import check_sources, read_records
from prunetune.data_recipes.recipe import read_recipe
from prunetune.data_recipes.sample import DataError
from prunetune.models import wrap_projector
from prunetune.models.blueprint import check_model
from prunetune.models.profile import resolved
from prunetune.train.deepspeed_settings import zero_stage
from prunetune.train.elastic import hardest_of_each, settings_of
from prunetune.train.float8 import check_float8
from prunetune.train.freeze import freeze_all_but_projector
from prunetune.train.objectives.start import check_objective
from prunetune.train.start_from import Start
from prunetune.train.tracking import wandb_mode


def check_before_launch(config: RecalibrateConfig) -> None:
    """Check the pruner, the data's files, DeepSpeed's JSON, tracking, and the model but for its weights.

    Raises:
        ConfigError, DataError, PruningError: for the first thing that can't work.
    """
    resolved(config.pruning).build()
    settings = settings_of(config.pruning, config.elastic)
    if config.engine.token_budget is not None and config.train.loss == "micro_batch_mean":
        raise ConfigError(
            "engine.token_budget lays samples out by their length, which would change a mean of micro-batches' means; "
            "set train.loss to token_mean, or leave the budget out"
        )
    check_objective(config)
    if zero_stage(config.train.deepspeed) == 3 and config.model.quantization is not None:
        raise ConfigError(
            f"model.quantization {config.model.quantization} can't be partitioned by ZeRO-3; set train.deepspeed to "
            "zero2, or leave the quantization out"
        )
    if config.engine.float8:
        check_float8(config.model.quantization, zero_stage(config.train.deepspeed), config.model.dtype)
    if config.train.patience is not None and not config.train.held_out:
        raise ConfigError(
            f"train.patience {config.train.patience} counts held-out losses, and with train.held_out 0 there are none; "
            "set train.held_out to a number of samples, or leave patience out"
        )
    Start.of(config.train.start_from)
    _check_device(config)
    _check_tracking(config.tracking)
    _check_data(config.data.recipe, config.data.file, config.data.image_root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the libraries' about one another
        model = check_model(config.model, config.pruning, hardest_of_each(settings))
        freeze_all_but_projector(wrap_projector(model, config.train.trainable))


def _check_device(config: RecalibrateConfig) -> None:
    on_gpu = torch.cuda.is_available()
    # DeepSpeed asks the same, and its answer is a traceback.
    if config.model.dtype == "float16" and not on_gpu and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise ConfigError("model.dtype: DeepSpeed can't train in float16 on this CPU; use bfloat16 or float32")
    if on_gpu and config.devices is not None and config.devices > torch.cuda.device_count():
        raise ConfigError(f"devices is {config.devices}, but there are {torch.cuda.device_count()} GPUs here")


def _check_tracking(tracking: TrackingConfig) -> None:
    if tracking.wandb == "online":  # the other modes stop nothing, and say what they do when they do it
        wandb_mode(tracking.wandb)


def _check_data(name: str, file: str | None, image_root: str | None) -> None:
    recipe = read_recipe(name)
    if isinstance(recipe, LlavaJsonRecipe):
        check_sources(recipe.sources or ())
        next(read_records(recipe.data_file(file, image_root)), None)  # it is there, and it begins as it should
    if image_root is not None and not Path(image_root).is_dir():
        raise DataError(f"data.image_root {image_root} is no folder")
