"""One YAML for a whole table: models x methods x budgets x projectors x benchmarks."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from prunetune.configs.schema import (
    Backend,
    BackendOptions,
    ModelConfig,
    NamedMethod,
    PluggedConfig,
    Section,
    TrackingConfig,
    check_backend_options,
)
from prunetune.data_recipes.sampling import VideoSampling
from prunetune.pruning.spec import StageSpec

ProjectorKind = Literal["training-free", "tuned", "elastic"]


class TableModel(Section):
    """One of the table's models, and the recalibrations that its projectors come from."""

    model: ModelConfig | None = Field(None, description="which model; None is the one of `recalibrate` or `elastic`")
    name: str | None = Field(None, description="what the table calls it; None is the last part of its path")
    recalibrate: str | None = Field(
        None, description="configuration of a recalibration, whose pruning and seed every tuned arm replaces"
    )
    elastic: str | None = Field(None, description="configuration of the one recalibration for many settings")

    @model_validator(mode="after")
    def _some_model(self) -> TableModel:
        if self.model is None and self.recalibrate is None and self.elastic is None:
            raise ValueError("give a model, or a recalibration that names one")
        return self


class TableMethod(NamedMethod):
    """One of the table's methods."""

    pruner: str = Field("identity", description="a name from `prunetune list pruners`")
    pruning: dict[str, Any] = Field(
        default_factory=dict, description="other fields of `pruning` for this method, such as profile or scope"
    )
    stages: list[StageSpec] = Field(
        default_factory=list,
        description="as of pruning.stages. A budget is then the average of visual tokens per layer that the one stage "
        "without keep is solved for, and the pruner's own stands in pruning.keep; where all stages have their budgets "
        "it is the pruner's, and without a pruner there is one row",
        exclude_if=lambda stages: not stages,  # tables without any stay, to the byte
    )
    budgets: list[int | float | str] | None = Field(None, description="its own budgets; None are the table's")
    projectors: list[ProjectorKind] | None = Field(None, description="its own projectors; None are the table's")

    @model_validator(mode="after")
    def _something(self) -> TableMethod:
        if self.pruner == "identity" and not self.stages:
            raise ValueError("give a pruner, or stages; all tokens are in every table, as its dense row")
        return self


class WorkersConfig(Section):
    """Where arms are evaluated, and on Ray and Slurm recalibrated."""

    engine: Literal["local", "ray", "slurm", "submitit-local"] = Field(
        "local",
        description="processes on this machine; Ray tasks; Slurm arrays by submitit; or submitit's processes on this "
        "machine",
    )
    devices: int | None = Field(
        None,
        ge=1,
        description="processes, one a device; None is every GPU of this machine, or of Ray's cluster, or one process "
        "without any",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of a process; None shares the cores")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="of the engine: of ray.init, as {address: auto}; of submitit's executor, as {slurm_partition: gpu, "
        "timeout_min: 240}",
    )
    training_options: dict[str, Any] = Field(
        default_factory=dict,
        description="of submitit's executor for a recalibration, on top of `options` with its own devices as "
        "gpus_per_node; null takes one away",
    )


Layout = Literal["markdown", "csv", "latex", "json", "html"]


class TableConfig(PluggedConfig):
    """The table that papers print, from one file: what is missing is trained and evaluated, the rest is read."""

    title: str = Field("Results", description="above the table")
    models: list[TableModel] = Field(description="models, each with its recalibrations")
    methods: list[TableMethod] = Field(description="pruners, by name or with options")
    budgets: list[int | float | str] = Field(description='budgets, each as of pruning.keep: 64, 0.111 or "11.1%"')
    projectors: list[ProjectorKind] = Field(
        default=["training-free"],
        description="rows of every method and budget: the base's projector, one tuned for the row, one for all rows",
    )
    seeds: list[int] | None = Field(
        None, description="a training for each; a row is the mean over them. None is the recalibration's own seed"
    )
    training: dict[str, Any] = Field(
        default_factory=dict, description="options of every recalibration, as {train.max_steps: 100}"
    )
    tasks: list[str] = Field(description="benchmarks, from `prunetune list tasks`")
    data: str | None = Field(None, description="folder of the benchmarks' files, as of `prunetune evaluate`")
    limit: int | None = Field(None, ge=1, description="first items of every task only")
    batch_size: int = Field(1, ge=1, description="of evaluations; scores shift with it in half precision")
    max_new_tokens: int = Field(128, ge=1, description="longest answer in tokens")
    share_prefix: bool = Field(
        False,
        description="compute what the questions about one image begin with once, where they share a batch; the same "
        "but for last bits, so it is in every arm's manifest",
        exclude_if=lambda share: not share,
    )
    backend: Backend = Field(
        "plain",
        description="how answers are generated: batch by batch; prompts that join and leave a running batch of "
        "batch_size (continuous); or into a cache of one size with compiled steps (static). The same but for last "
        "bits, so it is in every arm's manifest",
        exclude_if=lambda backend: backend == "plain",
    )
    backend_options: BackendOptions = Field(
        default_factory=BackendOptions,
        description="of that backend",
        exclude_if=lambda options: options == BackendOptions(),
    )
    max_pixels: int = Field(50_000_000, ge=1, description="images with more pixels are refused before they are decoded")
    video: VideoSampling = VideoSampling()
    hard: int | float | str | None = Field(
        None,
        description="budget of a down-sampling baseline; further columns then ask only what it gets wrong (VTC-Bench)",
    )
    features: bool = Field(
        True, description="encode the images of all benchmarks once a model, and run every arm from what was kept"
    )
    training_features: bool = Field(
        False, description="do the same with the images that are trained on, where several recalibrations share them"
    )
    quoted: list[str] = Field(default_factory=list, description="quoted tables to stand beside, by name or file")
    allow: list[str] = Field(
        default_factory=list, description="fields in which arms may differ all the same, told in a footnote"
    )
    rescore: bool = Field(
        False,
        description="score the saved predictions anew where scorers changed since, told in a footnote",
        exclude_if=lambda rescore: not rescore,
    )
    layouts: list[Layout] = Field(
        default=["markdown", "csv", "latex", "json", "html"], description="which files are written"
    )
    examples: int = Field(24, ge=0, description="flipped answers with their images in the HTML report, at most")
    workers: WorkersConfig = WorkersConfig()
    tracking: TrackingConfig = TrackingConfig()
    output: str = Field(description="folder of everything that is written")
    remake: bool = Field(
        False,
        description="delete cells and trainings in the output folder that are of other settings than this file's, and "
        "make them anew; without it they are named, and nothing starts",
    )
    overwrite: bool = Field(False, description="delete what an earlier table wrote there, that alone, and start over")

    @model_validator(mode="after")
    def _read_by_the_backend(self) -> Self:
        check_backend_options(self.backend, self.backend_options, self.share_prefix)
        return self

    @field_validator("models", "methods", "budgets", "projectors", "tasks")
    @classmethod
    def _not_empty(cls, values: list[Any]) -> list[Any]:
        if not values:
            raise ValueError("name at least one")
        return values

    @field_validator("tasks", "projectors", "budgets")
    @classmethod
    def _each_once(cls, values: list[Any]) -> list[Any]:
        for number, value in enumerate(values):
            if value in values[:number]:
                raise ValueError(f"{value!r} stands there twice")
        return values
