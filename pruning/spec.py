"""What to prune with, as a configuration says it: the one place where these options are written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from prunetune.pruning.budget import check_budget
from prunetune.pruning.errors import PruningError

if TYPE_CHECKING:
    from prunetune.pruning.types import Pruner


class StageSpec(BaseModel):
    """One method that drops visual tokens between layers of the LLM."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: str = Field(description="a name from `prunetune list stages`, or package.module:Class")
    boundaries: list[int] | None = Field(
        None, description="for each step the first layer that sees fewer tokens, from 0; none are the paper's"
    )
    keep: int | float | str | list[int | float | str] | None = Field(
        None,
        description="for each boundary how many visual tokens of a row stay, of those that enter the LLM: 64, 0.5 or "
        '"50%"; none are the paper\'s',
    )
    average: int | float | None = Field(
        None, description="visual tokens per layer, the mean over all layers, that keep is solved from"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="the stage's own hyperparameters")

    @property
    def label(self) -> str:
        """Its name with what is set of it but the budget: ``fastv``, ``fastv (boundaries=[3])``."""
        told = [] if self.boundaries is None else [f"boundaries={self.boundaries}"]
        told += [f"{key}={value}" for key, value in self.options.items()]
        return f"{self.name} ({', '.join(told)})" if told else self.name

    @property
    def budget(self) -> str:
        """Its budget as it was asked for: ``32 a layer``, ``50%``, ``300/200/110``; empty is the paper's."""
        if self.average is not None:
            return f"{self.average:g} a layer"
        keeps = self.keep if isinstance(self.keep, list) else [self.keep]
        return "" if self.keep is None else "/".join(map(str, keeps))


class PruningSpec(BaseModel):
    """Which pruner, and how many visual tokens it keeps."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    pruner: str = Field("identity", description="a name from `prunetune list pruners`")
    keep: int | float | str = Field("100%", description='budget per item or image, see scope: 64, 0.111 or "11.1%"')
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own hyperparameters")
    scope: Literal["item", "image"] = Field(
        "item",
        description="what the pruner chooses from, and what the budget counts for: each crop of an image or frame of a "
        "video, or the whole image or video; methods for videos always choose from the whole video",
    )
    video_budget: Literal["auto", "frame", "clip", "second"] = Field(
        "auto",
        description="what keep counts for in a video: each frame, the clip, or each second of it; auto is the frame, "
        "and with scope image the clip",
    )
    small_images: Literal["stop", "keep_all"] = Field(
        "stop", description="images with fewer visual tokens than the budget: stop and name them, or keep all they have"
    )
    text_tower: str | None = Field(
        None,
        description="folder or hub id of the CLIP checkpoint that the vision tower comes from, for methods that "
        "compare visual tokens with text in CLIP's space",
    )
    profile: str | None = Field(
        None,
        description="file that `prunetune calibrate` wrote for this model and method: what options leaves open is as "
        "it was fitted",
        exclude_if=lambda profile: profile is None,  # records of those who name none stay, to the byte
    )
    position_policy: Literal["auto", "compact", "original"] = Field(
        "auto",
        description="positions of the kept tokens: numbered anew, as in the full sequence, or what suits the family",
    )
    choose_with: Literal["tuned", "original"] = Field(
        "tuned",
        description="the projector by whose output methods choose that choose by it (divprune, fps, crisprune, "
        "cdpruner, adaptive and trimtokenator do): the one that runs, or the base's. Train and evaluate with the same",
        exclude_if=lambda which: which == "tuned",  # records of before this was a choice stay, to the byte
    )
    newline: Literal["rows", "all", "none"] = Field(
        "rows",
        description="row-end tokens that stay, in families that have them: of rows with kept tokens, all or none",
    )
    stages: list[StageSpec] = Field(
        default_factory=list,
        description="methods that drop more visual tokens inside the LLM, between its layers",
        exclude_if=lambda stages: not stages,  # records of those who have none stay, to the byte
    )

    # The slash: a configuration's key may be called "self", which is an unknown key and no error of Python's.
    def __init__(
        self, /, pruner: str = "identity", keep: int | float | str = "100%", options: Any = None, **fields: Any
    ):
        super().__init__(pruner=pruner, keep=keep, options={} if options is None else options, **fields)

    @model_serializer(mode="wrap")
    def _without_unset_video_budget(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Records of arms on images stay, to the byte, what they were before videos had budgets.
        written = write(self)
        if written.get("video_budget") == "auto":
            del written["video_budget"]
        return written

    @property
    def dense(self) -> bool:
        """Whether every layer of the LLM sees every visual token: nothing is pruned before it, and nothing inside."""
        return self.pruner == "identity" and not self.stages

    @property
    def methods(self) -> list[str]:
        """Names of what drops tokens: the pruner if it does, and the stages in their order."""
        return [name for name in (self.pruner, *(stage.name for stage in self.stages)) if name != "identity"]

    @property
    def method(self) -> str:
        """What it is called in tables: ``dense``, ``divprune``, ``fastv``, ``divprune+fastv``."""
        return "+".join(self.methods) or "dense"

    @property
    def budget(self) -> str:
        """The budgets as they were asked for: ``64``, ``32 a layer``, ``64, 32 a layer``; empty without pruning.

        A budget of a stage that is its paper's is not told.
        """
        told = [] if self.pruner == "identity" else [str(self.keep)]
        return ", ".join([*told, *(stage.budget for stage in self.stages if stage.budget)])

    def build(self) -> Pruner:
        """Return the pruner.

        Raises:
            PruningError: for an unknown name, option or budget, or a profile: which model it is for only an arm knows.
        """
        from prunetune.pruning.registry import build_pruner  # methods need torch, options do not

        check_budget(self.keep)
        if self.profile is not None:
            raise PruningError(
                f"the profile {self.profile} is read together with its model: load both with prunetune.Arm.load, or "
                "write its options into pruning.options"
            )
        return build_pruner(self.pruner, self.options)
