"""One YAML for a visualization: images and a question, methods x budgets, and what is written."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from prunetune.configs.load import ConfigError, value_of
from prunetune.configs.schema import ModelConfig, NamedMethod, PluggedConfig
from prunetune.data_recipes.sampling import VideoSampling

Format = Literal["png", "svg", "html"]


class ShownMethod(NamedMethod):
    """One of the methods that are drawn, a row of the grid; with an adapter two rows."""

    pruning: dict[str, Any] = Field(
        default_factory=dict, description="other fields of `pruning` for this method, such as scope, profile or stages"
    )
    budgets: list[int | float | str] | None = Field(None, description="its own budgets; None are the figure's")
    adapter: str | None = Field(
        None, description="folder of a projector recalibrated for it, which is drawn below the base's own"
    )


def _usual() -> list[Any]:
    return ["fastervlm", "vispruner", "prismprune", "divprune"]


def _every_format() -> list[Format]:
    return ["png", "svg", "html"]


class VisualizeConfig(PluggedConfig):
    """Draw what methods keep of images, and what the model answers: methods x budgets, for each image."""

    model: ModelConfig
    methods: list[ShownMethod] = Field(
        default_factory=_usual,
        validate_default=True,
        description="pruners, by name or with options; a row of the grid each",
    )
    budgets: list[int | float | str] = Field(
        default=[16], description='budgets, each as of pruning.keep: 64, 0.111 or "11.1%"; a column of the grid each'
    )
    pruning: dict[str, Any] = Field(
        default_factory=dict, description="other fields of `pruning` for all methods, such as text_tower or scope"
    )
    task: str | None = Field(
        None, description="a benchmark whose images and questions are shown; None are the images below"
    )
    data: str | None = Field(None, description="folder of the benchmark's published files, as of `prunetune evaluate`")
    ids: list[str] = Field(
        default_factory=list, description="which of its questions; none takes the first about each image"
    )
    images: list[str] = Field(default_factory=list, description="your own images: files, or folders of them")
    videos: list[str] = Field(
        default_factory=list, description="your own videos: files, or folders of which each holds a video's frames"
    )
    question: str | None = Field(None, description="what is asked about your own images and videos")
    count: int = Field(4, ge=1, description="how many images at most")
    max_new_tokens: int = Field(32, ge=1, description="longest answer in tokens")
    max_pixels: int = Field(50_000_000, ge=1, description="images with more pixels are refused before they are decoded")
    video: VideoSampling = VideoSampling()
    maps: bool = Field(
        True, description="draw the attention that methods read, and how much each token has to do with the question"
    )
    formats: list[Format] = Field(
        default_factory=_every_format, description="which files are written: a PNG and an SVG an image, one HTML page"
    )
    device: str | None = Field(None, description="cuda, cuda:1 or cpu; None is the GPU if there is one")
    output: str = Field("runs/visualize", description="folder of everything that is written")
    overwrite: bool = Field(
        False, description="write into a folder that holds files of others, and change none of them"
    )

    @field_validator("methods", "budgets", "formats")
    @classmethod
    def _some(cls, values: list[Any]) -> list[Any]:
        if not values:
            raise ValueError("name at least one")
        return values

    @field_validator("budgets", "formats", "ids", "images", "videos")
    @classmethod
    def _each_once(cls, values: list[Any]) -> list[Any]:
        for number, value in enumerate(values):
            if value in values[:number]:
                raise ValueError(f"{value!r} stands there twice")
        return values

    @model_validator(mode="after")
    def _one_source(self) -> VisualizeConfig:
        own = bool(self.images or self.videos)
        if own and self.task is not None:
            raise ValueError(f"task {self.task!r} has images of its own; give a task, or images and a question")
        if own and not (self.question or "").strip():
            raise ValueError("images of your own need a question, which the model answers; set question")
        if self.question is not None and not own:
            raise ValueError("a question is asked about images of your own; give images, or leave the question out")
        if not own and self.task is None:
            raise ValueError("there is nothing to draw: give a task, or images and a question")
        names = [method.label for method in self.methods]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two methods are called {', '.join(twice)}; tell them apart with `name`")
        return self


def with_options(methods: list[ShownMethod], options: list[str]) -> list[ShownMethod]:
    """Return methods with further options, each written ``METHOD.OPTION=VALUE``, the value as in YAML.

    Raises:
        ConfigError: for anything else, and for a method that is not drawn.
    """
    for text in options:
        name, _, rest = text.partition(".")
        option, equals, value = rest.partition("=")
        if not (name and option and equals):
            raise ConfigError(f"--option {text}: write METHOD.OPTION=VALUE, as prismprune.salient_ratio=0.3")
        at = _method_at(methods, name, f"--option {text}")
        own = {**methods[at].options, option: value_of(value, f"--option {text}")}
        methods = [*methods[:at], methods[at].model_copy(update={"options": own}), *methods[at + 1 :]]
    return methods


def with_adapters(methods: list[ShownMethod], adapters: list[str]) -> list[ShownMethod]:
    """Return methods with adapters, each written ``METHOD=FOLDER``, or ``FOLDER`` where there is one method.

    Raises:
        ConfigError: for a method that is not drawn, or none where there are several.
    """
    for text in adapters:
        name, equals, folder = text.partition("=")
        if not equals:
            if len(methods) > 1:
                raise ConfigError(f"--adapter {text}: there are {len(methods)} methods; write METHOD=FOLDER")
            name, folder = methods[0].label, text
        at = _method_at(methods, name, f"--adapter {text}")
        methods = [*methods[:at], methods[at].model_copy(update={"adapter": folder}), *methods[at + 1 :]]
    return methods


def _method_at(methods: list[ShownMethod], name: str, what: str) -> int:
    names = [method.label for method in methods]
    if name not in names:
        raise ConfigError(f"{what}: no method is called {name!r}; there are {', '.join(names)}")
    return names.index(name)
