"""A table's YAML taken apart: models, arms, the trainings they need, and a cell for every arm and benchmark."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from prunetune.configs import (
    ConfigError,
    EvaluateConfig,
    ModelConfig,
    RecalibrateConfig,
    TableConfig,
    TableMethod,
    TableModel,
    TrackingConfig,
    load_config,
)
from prunetune.configs.table import ProjectorKind
from prunetune.errors import PrunetuneError
from prunetune.evaluation.tasks import get_task
from prunetune.models.seal import seal_of
from prunetune.outputs import OutputError
from prunetune.pruning import PruningError, PruningSpec
from prunetune.pruning.spec import StageSpec
from prunetune.pruning.stages.registry import stage_class

FEATURES, TRAINED, ARMS = "features", "trained", "arms"
"""Folders below a table's output folder."""
HARD = "downsample_hard"
"""The arm whose wrong answers are the hard part of every benchmark."""


@dataclass(frozen=True)
class Model:
    """One of the table's models.

    Attributes:
        name: what the table calls it.
        slug: its folder's name.
        config: which, and how it is loaded.
        source: its entry in the YAML.
    """

    name: str
    slug: str
    config: ModelConfig
    source: TableModel


@dataclass(frozen=True)
class Training:
    """A recalibration that arms of the table need.

    Attributes:
        name: of its folder, below ``trained/``.
        file: the configuration that it begins with.
        overrides: what is changed of it.
        config: both together.
    """

    name: str
    file: str
    overrides: tuple[str, ...]
    config: RecalibrateConfig

    @property
    def adapter(self) -> Path:
        """Where its projector will be."""
        return Path(self.config.output) / "adapter"


@dataclass(frozen=True)
class TableArm:
    """One arm, of one training if it is tuned.

    Attributes:
        model: whose.
        row: name of the table's row; arms that differ in the training's seed alone share it.
        seed: of the training; None of an arm that is not tuned, or where the YAML names no seeds.
        label: what the row is called, without which projector it is.
        spec: how it is pruned.
        kind: whose projector it runs with.
        training: that it needs.
    """

    model: Model
    row: str
    seed: int | None
    label: str
    spec: PruningSpec
    kind: ProjectorKind
    training: Training | None = None

    @property
    def name(self) -> str:
        """The folder's name, below ``arms/``."""
        arm = self.row if self.seed is None else f"{self.row}_seed{self.seed}"
        return f"{self.model.slug}/{arm}"


@dataclass(frozen=True)
class Cell:
    """An arm on one benchmark.

    Attributes:
        arm: which.
        task: the benchmark.
        config: of the evaluation.
    """

    arm: TableArm
    task: str
    config: EvaluateConfig

    @property
    def name(self) -> str:
        """For people, and for logs."""
        return f"{self.arm.name}/{self.task}"

    @property
    def folder(self) -> Path:
        """Where its results go."""
        return Path(self.config.output)


@dataclass(frozen=True)
class Plan:
    """All that a table is made of.

    Attributes:
        config: the YAML.
        models: in its order.
        arms: dense first, then by method, budget and projector, model after model.
        impossible: what can't be, a line each.
    """

    config: TableConfig
    models: list[Model]
    arms: list[TableArm]
    impossible: list[str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        """The table's folder."""
        return Path(self.config.output)

    @cached_property
    def trainings(self) -> list[Training]:
        """All recalibrations, each once."""
        found = {arm.training.name: arm.training for arm in self.arms if arm.training is not None}
        return list(found.values())

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells, in the order of the arms."""
        return [Cell(arm, task, self._evaluation(arm, task)) for arm in self.arms for task in self.config.tasks]

    @cached_property
    def stored_tasks(self) -> list[str]:
        """The benchmarks whose images are kept; videos, and several images at once, are read as they are."""
        return [name for name in self.config.tasks if self.config.features and get_task(name).storable]

    def specs(self, model: Model, base_alone: bool = False) -> list[PruningSpec]:
        """Return the prunings of a model's arms, each once; of those with the base's projector alone if asked."""
        found = []
        for arm in self.arms:
            if arm.model is model and arm.spec not in found and not (base_alone and arm.training is not None):
                found.append(arm.spec)
        return found

    def features(self, model: Model, task: str) -> Path:
        """Return where a benchmark's images are kept for a model: a table that is extended needs another cache."""
        # Stages read nothing of the tower: with and without them the same is kept of images.
        without = {"stages"}
        specs = []
        for spec in self.specs(model):
            if (own := spec.model_dump(exclude=without)) not in specs:
                specs.append(own)
        tuned = [
            arm.spec.model_dump(exclude=without) for arm in self.arms if arm.model is model and arm.training is not None
        ]
        config = self.config
        held = seal_of({"specs": specs, "tuned": tuned, "images": [config.data, config.limit, config.max_pixels]})
        return self.output / FEATURES / model.slug / f"{task}-{held[:8]}"

    def _evaluation(self, arm: TableArm, task: str) -> EvaluateConfig:
        config = self.config
        return EvaluateConfig(
            plugins=config.plugins,
            model=arm.model.config,
            pruning=arm.spec,
            adapter=None if arm.training is None else str(arm.training.adapter),
            tasks=[task],
            data=config.data,
            limit=config.limit,
            batch_size=config.batch_size,
            max_new_tokens=config.max_new_tokens,
            share_prefix=config.share_prefix,
            backend=config.backend,
            backend_options=config.backend_options,
            max_pixels=config.max_pixels,
            video=config.video,
            features=str(self.features(arm.model, task)) if task in self.stored_tasks else None,
            tracking=tracked(config, "evaluate", f"{arm.name}/{task}", [arm.label, arm.kind, task]),
            output=str(self.output / ARMS / arm.name / task),
        )


def lay_out(config: TableConfig) -> Plan:
    """Take a table apart; nothing is read but configurations.

    Raises:
        ConfigError: for a configuration that can't be read, or two models, methods or rows of one name.
    """
    models = [_model(source) for source in config.models]
    _each_once("models", [model.slug for model in models], "give one of them a name")
    plan = Plan(config, models, [])
    for model in models:
        try:
            plan.arms.extend(_arms(config, model, plan.impossible))
        except (OutputError, ConfigError):
            raise
        except PrunetuneError as error:
            plan.impossible.append(f"{model.name}: {error}")
    _each_once("rows", [arm.name for arm in plan.arms], "give one of the methods a name")
    return _from_features(plan) if config.training_features else plan


def _from_features(plan: Plan) -> Plan:
    """Return the plan with trainings that read what was kept of their images: a cache for all on the same data."""
    specs: dict[tuple[str, str], list[Any]] = {}
    for training in plan.trainings:
        config = training.config
        own = [config.pruning.model_dump(), config.elastic.model_dump(), config.objective.asks_dense_model]
        specs.setdefault((training.name.partition("/")[0], config.data.model_dump_json()), []).append(own)
    arms = []
    for arm in plan.arms:
        if arm.training is None:
            arms.append(arm)
            continue
        config = arm.training.config
        key = (arm.model.slug, config.data.model_dump_json())
        held = seal_of({"data": key[1], "specs": specs[key]})
        cache = plan.output / FEATURES / arm.model.slug / f"training-{held[:8]}"
        overrides = (*arm.training.overrides, "--features", json.dumps(str(cache)))
        config = config.model_copy(update={"features": str(cache)})
        arms.append(replace(arm, training=replace(arm.training, overrides=overrides, config=config)))
    return replace(plan, arms=arms)


def tracked(config: TableConfig, job_type: str, name: str, tags: Sequence[str] = ()) -> TrackingConfig:
    """Return how one of a table's runs is tracked: all of them are one group."""
    if config.tracking.wandb == "off":
        return config.tracking
    group = config.tracking.group or slug(Path(config.output).name)
    own = {"group": group, "job_type": job_type, "name": name, "tags": [*config.tracking.tags, *tags]}
    return config.tracking.model_copy(update=own)


def slug(text: str) -> str:
    """Return a folder's name for anything that people write."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text.replace("%", "pct")).strip("-.") or "x"


def _model(source: TableModel) -> Model:
    named: list[tuple[str, ModelConfig]] = []
    if source.model is not None:
        named.append(("model", source.model))
    for key in ("recalibrate", "elastic"):
        file = getattr(source, key)
        if file is not None:
            named.append((key, load_config(RecalibrateConfig, file, ["--output", "unused"]).model))
    for key, config in named[1:]:
        if config != named[0][1]:
            raise ConfigError(
                f"models: {named[0][0]} and {key} of {source.name or named[0][1].path} name different models "
                f"({_difference(named[0][1], config)}); a table's arms run on one"
            )
    config = named[0][1]
    name = source.name or Path(config.path).name
    return Model(name, slug(name), config, source)


def _difference(one: ModelConfig, other: ModelConfig) -> str:
    for key, value in one.model_dump().items():
        if value != other.model_dump().get(key):
            return f"{key} {value!r} and {other.model_dump().get(key)!r}"
    return "quantization"


def _arms(config: TableConfig, model: Model, impossible: list[str]) -> Iterator[TableArm]:
    """Yield the arms of a model, and note those that can't be."""
    dense = PruningSpec()
    yield TableArm(model, "dense", None, "dense", dense, "training-free")
    if config.hard is not None:
        yield TableArm(model, HARD, None, "downsample", PruningSpec("downsample", config.hard), "training-free")
    lacking = set()
    for method in config.methods:
        for spec in _specs(config, method):
            for kind in config.projectors if method.projectors is None else method.projectors:
                if kind != "training-free" and _file(model, kind) is None:
                    lacking.add(kind)
                    continue
                yield from _of_kind(config, model, method, spec, kind)
    if _wants(config, "elastic") and model.source.elastic is not None:
        for seed, training in _trainings(config, model, "elastic", "elastic", None):
            yield TableArm(model, "dense_elastic", seed, "dense", dense, "elastic", training)
    for kind in sorted(lacking):
        key = "recalibrate" if kind == "tuned" else "elastic"
        impossible.append(f"{model.name}: no {kind} row can be made, since its entry in models has no {key}")


def _wants(config: TableConfig, kind: ProjectorKind) -> bool:
    return any(kind in (method.projectors or config.projectors) for method in config.methods)


def _specs(config: TableConfig, method: TableMethod) -> list[PruningSpec]:
    """Return the pruning of each of a method's budgets.

    Raises:
        ConfigError: for a budget that is no average where stages are solved for one, or an unknown stage.
    """
    budgets = config.budgets if method.budgets is None else method.budgets
    if not method.stages:
        return [_spec(method, {"keep": budget}) for budget in budgets]
    if "stages" in method.pruning:
        raise ConfigError(f"methods: {_called(method)} has stages and pruning.stages; leave one out")
    solved = [number for number, stage in enumerate(method.stages) if _is_open(stage)]
    if len(solved) > 1:
        raise ConfigError(
            f"methods: {_called(method)} has {len(solved)} stages without keep, and a budget is the average of one; "
            "give the others keep"
        )
    if not solved:
        if method.pruner == "identity":
            return [_spec(method, {"stages": method.stages})]
        return [_spec(method, {"keep": budget, "stages": method.stages}) for budget in budgets]
    found = []
    for budget in budgets:
        if isinstance(budget, str) or budget <= 0:
            raise ConfigError(
                f"methods: {_called(method)} has stages that are solved for a budget, which is a number of visual "
                f"tokens per layer, and {budget!r} is none; give the method budgets of its own"
            )
        stages = list(method.stages)
        stages[solved[0]] = stages[solved[0]].model_copy(update={"average": budget})
        found.append(_spec(method, {"stages": stages}))
    return found


def _is_open(stage: StageSpec) -> bool:
    """Return whether a stage's budget is the table's."""
    try:
        drops_all = stage_class(stage.name).drops_all
    except PruningError as error:
        raise ConfigError(f"methods: {error}") from None
    return stage.keep is None and stage.average is None and not drops_all


def _spec(method: TableMethod, own: Mapping[str, Any]) -> PruningSpec:
    values = {**method.pruning, "pruner": method.pruner, "options": method.options, **own}
    try:
        return PruningSpec.model_validate(values)
    except ValueError as error:
        raise ConfigError(f"methods: {_called(method)}: {_one_line(error)}") from None


def _called(method: TableMethod) -> str:
    """Return what a method's rows are called."""
    if method.name is not None or not method.stages:
        return method.name or method.pruner
    return "+".join(name for name in (method.pruner, *(stage.name for stage in method.stages)) if name != "identity")


def _one_line(error: ValueError) -> str:
    details = getattr(error, "errors", None)
    if details is None:
        return str(error)
    return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in details())


def _of_kind(
    config: TableConfig, model: Model, method: TableMethod, spec: PruningSpec, kind: ProjectorKind
) -> Iterator[TableArm]:
    label = _called(method)
    name = slug(f"{label}_{spec.budget if spec.stages else spec.keep}".rstrip("_"))
    if kind == "training-free":
        yield TableArm(model, name, None, label, spec, kind)
        return
    # One elastic projector serves all rows; a tuned one is the row's own.
    trained = "elastic" if kind == "elastic" else name
    for seed, training in _trainings(config, model, kind, trained, spec):
        yield TableArm(model, f"{name}_{kind}", seed, label, spec, kind, training)


def _file(model: Model, kind: ProjectorKind) -> str | None:
    return model.source.recalibrate if kind == "tuned" else model.source.elastic


def _trainings(
    config: TableConfig, model: Model, kind: ProjectorKind, name: str, spec: PruningSpec | None
) -> Iterator[tuple[int | None, Training]]:
    """Yield the training of each seed; the seed is None where the YAML names none."""
    file = _file(model, kind)
    assert file is not None  # asked before
    options: dict[str, Any] = {**config.training}
    if kind == "tuned" and spec is not None:
        options["pruning"] = spec.model_dump(exclude_defaults=True)
    tags = [kind] if spec is None else [kind, spec.method, spec.budget or str(spec.keep)]
    if config.plugins:
        options["plugins"] = config.plugins
    seeds: list[int | None] = [*config.seeds] if config.seeds else [None]
    for seed in seeds:
        own = dict(options)
        folder = f"{model.slug}/{name}"
        if seed is not None:
            own["train.seed"] = seed
            folder += f"_seed{seed}"
        own["tracking"] = tracked(config, "recalibrate", folder, tags).model_dump()
        own["output"] = str(Path(config.output) / TRAINED / folder)
        overrides = []
        for key, value in own.items():
            overrides += [f"--{key}", json.dumps(value, ensure_ascii=False)]
        recalibration = load_config(RecalibrateConfig, file, overrides)
        yield seed, Training(folder, file, tuple(overrides), recalibration)


def _each_once(what: str, names: list[str], advice: str) -> None:
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ConfigError(f"two {what} of the table are called {name!r}; {advice}")
