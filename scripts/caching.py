"""What ``prunetune cache`` does: a configuration's images, and the prunings that it and the command line name."""

from __future__ import annotations

from collections.abc import Sequence

from prunetune.configs import ConfigError, EvaluateConfig, RecalibrateConfig, load_config
from prunetune.configs.load import sets
from prunetune.data_recipes import load_recipe
from prunetune.evaluation.run.features import feature_data
from prunetune.models import Arm
from prunetune.models.features import FeatureData, make_features
from prunetune.models.ranks import Ranks
from prunetune.outputs import OutputFolder
from prunetune.plugins import plugin_records
from prunetune.pruning import Budget, PruningSpec
from prunetune.screen import say


def read_settings(config: str, overrides: list[str]) -> RecalibrateConfig | EvaluateConfig:
    """Return the configuration of a recalibration or an evaluation.

    Raises:
        ConfigError: if it can't be used, or names no folder for the features.
    """
    settings: RecalibrateConfig | EvaluateConfig
    if sets(config, "tasks", overrides):
        settings = load_config(EvaluateConfig, config, overrides)
    else:
        settings = load_config(RecalibrateConfig, config, overrides)
    if settings.features is None:
        raise ConfigError("nothing says where the features go: give --features FOLDER, or write it into the file")
    return settings


def cache(
    settings: RecalibrateConfig | EvaluateConfig,
    folder: OutputFolder,
    ranks: Ranks,
    pruners: Sequence[str] = (),
    budgets: Sequence[str] = (),
    configs: Sequence[str] = (),
    batch_size: int = 16,
) -> None:
    """Make the features of a configuration's images; every rank calls this, and rank 0 has opened the folder.

    Args:
        settings: model, data and the first pruning.
        folder: where they go.
        ranks: this process among its peers.
        pruners: further ones with their default options.
        budgets: further ones of every pruner.
        configs: further configurations, of which the pruning is read.
        batch_size: images per run of the tower.

    Raises:
        ConfigError, PruningError, DataError, FeatureError: for options or data that can't work.
    """
    ranks.check_same(plugin_records())
    prunings = prunings_of(settings.pruning, pruners, budgets, configs)
    data = data_of(settings)
    arm = Arm.load(settings.model, prunings[0], getattr(settings, "adapter", None))
    make_features(folder, arm, prunings, data, ranks, batch_size)
    if ranks.is_zero:
        say(f"features: {folder.path}; recalibrate and evaluate take them with --features {folder.path}")


def prunings_of(
    first: PruningSpec, pruners: Sequence[str], budgets: Sequence[str], configs: Sequence[str]
) -> list[PruningSpec]:
    """Return every pruner at every budget, and the prunings of further configurations.

    Raises:
        ConfigError, PruningError: for a name, an option or a budget that can't be.
    """
    specs = [first]
    # A profile and options belong to the first pruner alone.
    specs += [first.model_copy(update={"pruner": name, "options": {}, "profile": None}) for name in pruners]
    found = list(specs)
    for spec in specs:
        found += [spec.model_copy(update={"keep": _budget(budget)}) for budget in budgets]
    for name in configs:
        if sets(name, "tasks"):
            found.append(load_config(EvaluateConfig, name).pruning)
        else:
            found.append(load_config(RecalibrateConfig, name).pruning)
    for spec in found:
        spec.model_copy(update={"profile": None}).build()  # a wrong name stops here, before anything is loaded
    return found


def _budget(text: str) -> Budget:
    """Return a budget as a YAML file would have it: ``64``, ``0.111`` or ``50%``."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def data_of(settings: RecalibrateConfig | EvaluateConfig) -> FeatureData:
    """Return the images of a configuration: its recipe's, or its tasks'.

    Raises:
        DataError, TaskError: if they can't be read.
    """
    if isinstance(settings, RecalibrateConfig):
        data = load_recipe(settings.data.recipe, **settings.data.model_dump(exclude={"recipe"}))
        return FeatureData.of_recipe(data)
    return feature_data(settings.tasks, settings.data, settings.limit, settings.max_pixels, None)
