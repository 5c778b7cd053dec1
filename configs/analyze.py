"""What `prunetune analyze` looks at: a model, methods, images, and finished evaluations."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from prunetune.configs.schema import ModelConfig, NamedMethod, PluggedConfig, Section
from prunetune.pruning.spec import PruningSpec

Kind = Literal["attention", "diversity", "other"]
Analysis = Literal["complexity", "diversity", "concentration", "positions", "overlap", "corruption"]
OF_CLEAN_IMAGES: tuple[Analysis, ...] = ("complexity", "diversity", "concentration", "positions", "overlap")


class AnalyzedMethod(NamedMethod):
    """One of the methods that are compared."""

    keep: int | float | str | None = Field(None, description="its own budget; None is everybody's")

    def spec(self, keep: int | float | str, text_tower: str | None) -> PruningSpec:
        """Return its pruning, with what all methods share."""
        own = keep if self.keep is None else self.keep
        return PruningSpec(self.pruner, own, self.options, small_images="keep_all", text_tower=text_tower)


class CorruptionConfig(Section):
    """Corrupted images: of some questions, each corruption at each severity."""

    names: list[str] | None = Field(None, description="corruptions by name; None are the fifteen of ImageNet-C")
    severities: list[int] = Field(default=[1, 2, 3, 4, 5], description="of 1 to 5; the adaptive study took 1 and 3")
    questions: int = Field(16, ge=1, description="the first ones of every benchmark, one of an image")
    max_new_tokens: int = Field(16, ge=1, description="longest answer in tokens")
    seed: int = Field(0, ge=0, description="of noise, frost and the like")

    @field_validator("severities")
    @classmethod
    def _in_range(cls, values: list[int]) -> list[int]:
        if not values or len(set(values)) != len(values) or not set(values) <= {1, 2, 3, 4, 5}:
            raise ValueError("name severities from 1 to 5, at least one and each only once")
        return sorted(values)


class AnalyzeConfig(PluggedConfig):
    """What methods keep of images and why, and what finished evaluations say about invented objects."""

    model: ModelConfig = ModelConfig(path="assets/tiny_vlm", dtype="float32")
    adapter: str | None = Field(None, description="folder of a recalibrated projector; None is the base's own")
    methods: list[AnalyzedMethod] = Field(
        default=["fastervlm", "vispruner", "prismprune", "divprune"],
        validate_default=True,
        description="pruners that are compared, by name or with options",
    )
    keep: int | float | str = Field("11.1%", description='budget of each, as of pruning.keep: 64, 0.111 or "11.1%"')
    text_tower: str | None = Field(None, description="CLIP checkpoint of the vision tower, for methods that read text")
    tasks: list[str] = Field(default_factory=list, description="benchmarks whose images are looked at")
    data: str | None = Field(None, description="folder of the benchmarks' files, as of `prunetune evaluate`")
    images: str | None = Field(None, description="a folder of images of your own, looked at like a benchmark's")
    question: str = Field("Describe this image.", description="asked about them, for methods that read the question")
    limit: int | None = Field(100, ge=1, description="first images of every benchmark or folder; null takes all")
    batch_size: int = Field(8, ge=1, description="images that are encoded together")
    max_pixels: int = Field(50_000_000, ge=1, description="images with more pixels are refused before they are decoded")
    analyses: list[Analysis] = Field(
        default=list(OF_CLEAN_IMAGES),
        description="of images: complexity, diversity, concentration, positions, overlap; and corruption, which asks "
        "questions about corrupted ones",
    )
    corruption: CorruptionConfig = CorruptionConfig()
    runs: list[str] = Field(
        default_factory=list, description="finished evaluations on POPE or CHAIR, which are read for hallucination"
    )
    kinds: dict[str, Kind] = Field(
        default_factory=dict,
        description="methods that count as attention or diversity there, or as other, beside those that are known",
    )
    allow: list[str] = Field(default_factory=list, description="fields in which runs may differ, as of `compare`")
    output: str = Field("runs/analysis", description="folder of tables, figures and the page")
    overwrite: bool = Field(False, description="use an output folder that holds other files")

    @field_validator("methods", "analyses")
    @classmethod
    def _not_empty(cls, values: list[Any]) -> list[Any]:
        if not values:
            raise ValueError("name at least one")
        return values

    @field_validator("methods")
    @classmethod
    def _names(cls, methods: list[AnalyzedMethod]) -> list[AnalyzedMethod]:
        labels = [method.label for method in methods]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two methods are called {', '.join(twice)}; tell them apart with name")
        if "dense" in labels:
            raise ValueError("no method may be called dense, which is the arm that keeps everything")
        return methods

    @field_validator("tasks", "runs", "analyses")
    @classmethod
    def _once(cls, names: list[str]) -> list[str]:
        if len(set(names)) != len(names):
            raise ValueError("name each only once")
        return names

    @model_validator(mode="after")
    def _something(self) -> AnalyzeConfig:
        if not (self.tasks or self.images or self.runs):
            raise ValueError(
                "there is nothing to look at: name benchmarks in tasks, a folder of images, or finished evaluations "
                "in runs"
            )
        return self

    @property
    def reads_images(self) -> bool:
        """Whether a model is run; without, finished evaluations alone are read."""
        return bool(self.tasks or self.images)

    @property
    def specs(self) -> dict[str, PruningSpec]:
        """The pruning of each method by its label."""
        return {method.label: method.spec(self.keep, self.text_tower) for method in self.methods}
