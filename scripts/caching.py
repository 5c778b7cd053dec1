"""What ``prunetune cache`` does: a configuration's images, and the prunings that it and the command line name."""

from __future__ import annotations

from collections.abc import Sequence

from prunetune.configs import ConfigError, EvaluateConfig, RecalibrateConfig, load_config
from prunetune.configs.load import sets
from prunetune.data_recipes import load_recipe
from prunetune.evaluation.run.features import feature_data
from prunetune.models import Arm
from prunetune.models.errors import FeatureError
from prunetune.models.features import FeatureData, make_features
from prunetune.models.ranks import Ranks
from prunetune.outputs import OutputFolder
from prunetune.plugins import plugin_records
from prunetune.pruning import Budget, PruningSpec
from prunetune.screen import say
from prunetune.train.elastic import settings_of


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
    all_tokens: bool = False,
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
        all_tokens: whether all tokens of the images are stored, whoever needs them.
        batch_size: images per run of the tower.

    Raises:
        ConfigError, PruningError, DataError, FeatureError: for options or data that can't work.
    """
    ranks.check_same(plugin_records())
    prunings = prunings_of(settings.pruning, pruners, budgets, configs)
    if isinstance(settings, RecalibrateConfig):
        prunings += [setting.spec for setting in settings_of(settings.pruning, settings.elastic)]
    data = data_of(settings)
    arm = Arm.load(settings.model, prunings[0], getattr(settings, "adapter", None))
    if isinstance(settings, RecalibrateConfig):
        all_tokens = all_tokens or has_teacher(settings)
        prunings, anew = stored_before_training(arm, prunings)
        if anew and ranks.is_zero:
            say(f"{', '.join(anew)} choose by the projector's output, so all tokens are stored, to choose from anew")
        all_tokens = all_tokens or bool(anew)
    if all_tokens:
        prunings = [*prunings, PruningSpec()]
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
            other = load_config(RecalibrateConfig, name)
            found += [other.pruning, *(setting.spec for setting in settings_of(other.pruning, other.elastic))]
    for spec in found:
        spec.model_copy(update={"profile": None}).build()  # a wrong name stops here, before anything is loaded
    return found


def has_teacher(settings: RecalibrateConfig) -> bool:
    """Return whether a recalibration runs the dense model beside its own, which reads all tokens."""
    objective = settings.objective
    return objective.teacher is None and any(objective.terms.get(name) for name in ("kl", "hidden", "feature"))


def stored_before_training(arm: Arm, prunings: Sequence[PruningSpec]) -> tuple[list[PruningSpec], list[str]]:
    """Return the prunings whose choice training does not change, and the names of the methods that choose anew.

    Raises:
        FeatureError: for a method whose choice changes, and that can't choose from stored features.
    """
    stored: list[PruningSpec] = []
    anew: dict[str, str] = {}
    asked: dict[str, bool] = {}
    for spec in prunings:
        method = spec.model_dump_json(exclude={"keep"})
        if method not in asked:
            pruned = arm.with_pruning(spec).pruned
            asked[method] = pruned.chooses_by_projector()
            if asked[method]:
                why = pruned.why_not_live()
                if why is not None:
                    raise FeatureError(
                        f"{spec.pruner} chooses by the projector's output, which training changes, and {why}: set "
                        "pruning.choose_with: original, or train without features"
                    )
                anew[spec.pruner] = method
        if not asked[method]:
            stored.append(spec)
    return stored, list(anew)


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
