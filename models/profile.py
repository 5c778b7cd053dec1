"""Profiles: what ``prunetune calibrate`` fitted of a method to a model, sealed, in a file that configurations name.

A profile's values are the method's options where a configuration says nothing of them. They are filled in when a model
is loaded, so that records and manifests hold the options that ran. Reading a profile needs no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prunetune.configs.load import is_shipped
from prunetune.data_recipes.sampling import VideoSampling
from prunetune.models.seal import SEAL, sealed, short, why_unsealed
from prunetune.models.stored import BaseHashes
from prunetune.outputs import OutputError, write_text, writing
from prunetune.pruning import PruningError, PruningSpec
from prunetune.reading import read_json, shown

KIND: Literal["prunetune profile"] = "prunetune profile"
FORMAT: Literal[1] = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ProfiledModel(_Part):
    """The model that a profile was fitted to; another one is refused.

    Attributes:
        path: folder or hub id, of an absolute path its last part.
        revision: hub revision.
        dtype: of the weights while it was fitted.
        quantization: of the weights while it was fitted.
        frozen_hash: SHA-256 of the stored weights without the projector.
        original_projector_hash: SHA-256 of the projector that the files hold.
        projectors: modules that the projector is made of.
        settings_hash: SHA-256 of configuration, processor, tokenizer and template files.
        text_tower_hash: SHA-256 of the text tower that the pruner reads; None if it reads none.
    """

    path: str
    revision: str | None
    dtype: str
    quantization: str | None = None
    frozen_hash: str
    original_projector_hash: str
    projectors: list[str]
    settings_hash: str
    text_tower_hash: str | None


class ProfiledData(_Part):
    """What a profile was fitted on.

    Attributes:
        source: "recipe" or "task".
        name: of the recipe or of the benchmark.
        part: which samples of it, in words.
        samples: how many.
        hash: SHA-256 of the samples in their order.
        video: which frames of their videos were looked at; None of images alone.
    """

    source: Literal["recipe", "task"]
    name: str
    part: str
    samples: int
    hash: str
    # Left out of images' profiles: they stay as they are, to the byte, and so do their seals.
    video: VideoSampling | None = Field(None, exclude_if=lambda video: video is None)


class Measured(_Part):
    """One value of an option and what was measured with it.

    Attributes:
        value: of the option.
        score: the mean, in the unit that the profile names; higher is better. None of a mean, which is no choice.
        gain: difference from the published value's score.
        gain_interval: 95 % interval of the difference, paired and by image; None where it was not compared.
    """

    value: Any
    score: float | None = None
    gain: float | None = None
    gain_interval: list[float] | None = None


class Profile(_Part):
    """A method's options, fitted to a model.

    Attributes:
        pruner: the method.
        options: the fitted options.
        stages: fitted boundaries, by the name of the stage; not in the file if there are none.
        pruning: the pruning they were fitted under: its budget, and the options that were set by hand.
        model: the model.
        data: the data.
        measure: what ``score`` of :class:`Measured` is, in words.
        evidence: by option, what was measured.
        reports: what else was told about the method's choices, means over the data.
        prunetune: which version of this package measured.
        plugins: what was loaded from outside this package.
    """

    kind: Literal["prunetune profile"] = KIND
    format: Literal[1] = FORMAT
    pruner: str
    options: dict[str, Any]
    stages: dict[str, list[int]] = Field(default_factory=dict, exclude_if=lambda stages: not stages)
    pruning: dict[str, Any]
    model: ProfiledModel
    data: ProfiledData
    measure: str | None
    evidence: dict[str, list[Measured]]
    reports: dict[str, float]
    prunetune: dict[str, Any]
    plugins: list[dict[str, Any]] = []

    @property
    def fitted(self) -> dict[str, Any]:
        """Options, and boundaries of stages, by name."""
        return {**self.options, **self.stages}

    def to_text(self) -> str:
        """Return the file's text, with its seal."""
        return json.dumps(sealed(self.model_dump()), indent=2) + "\n"

    def link(self) -> dict[str, Any]:
        """Return what records and manifests say of it; the options themselves stand in their pruning."""
        seal = sealed(self.model_dump())[SEAL]
        link = {"seal": seal, "options": self.options, "source": self.data.source, "fitted_on": self.data.name}
        return {**link, "stages": self.stages} if self.stages else link

    def fill(self, spec: PruningSpec) -> PruningSpec:
        """Return a specification whose options are complete: its own, and where it has none, the fitted ones."""
        stages = []
        for stage in spec.stages:
            fitted = self.stages.get(stage.name)
            is_open = stage.boundaries is None and fitted is not None
            stages.append(stage.model_copy(update={"boundaries": fitted}) if is_open else stage)
        options = {**self.options, **spec.options}
        return spec.model_copy(update={"options": options, "stages": stages, "profile": None})


def read_profile(path: str | Path) -> Profile:
    """Return a profile.

    Raises:
        PruningError: if it can't be read, is no profile, or was edited.
    """
    path = Path(path)
    if not path.is_file():
        raise PruningError(f"pruning.profile {path} does not exist; `prunetune calibrate --profile {path}` writes one")
    values = read_json(path, PruningError)
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise PruningError(f"pruning.profile {path} is no profile; name a file that `prunetune calibrate` wrote")
    if values.get("format") != FORMAT:
        raise PruningError(
            f"profile {path} has format {shown(values.get('format'))}, this version reads {FORMAT}; calibrate again"
        )
    wrong = why_unsealed(values)
    if wrong is not None:
        raise PruningError(
            f"profile {path} can't be trusted: {wrong}; calibrate again, and write options of your own into "
            "pruning.options"
        )
    del values[SEAL]
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, detail["loc"])) for detail in error.errors())
        raise PruningError(f"profile {path} is of another version ({fields}); calibrate again") from None


def profile_of(spec: PruningSpec) -> Profile | None:
    """Return the profile that a specification names, or None.

    Raises:
        PruningError: if it can't be used, or was fitted for another method.
    """
    if spec.profile is None:
        return None
    profile = read_profile(spec.profile)
    if profile.pruner != spec.pruner:
        raise PruningError(
            f"profile {spec.profile} was fitted for the pruner {profile.pruner!r}, this one is {spec.pruner!r}; name "
            f"the profile of {spec.pruner}, or leave pruning.profile out"
        )
    return profile


def resolved(spec: PruningSpec) -> PruningSpec:
    """Return a specification with the options of its profile filled in; raises PruningError as :func:`profile_of`."""
    profile = profile_of(spec)
    return spec if profile is None else profile.fill(spec)


def check_fitted_to(profile: Profile, name: str, base: BaseHashes, settings: str, text_tower: str | None) -> None:
    """Check that a profile was fitted to this very model.

    Args:
        profile: the profile.
        name: its file.
        base: hashes of the model's files.
        settings: hash of its configuration, processor, tokenizer and template.
        text_tower: hash of the text tower that the pruner reads; None if it reads none.

    Raises:
        PruningError: naming the first thing that differs, with both hashes.
    """
    own = {
        "frozen weights": (profile.model.frozen_hash, base.frozen_hash),
        "the projector in its files": (profile.model.original_projector_hash, base.original_projector_hash),
        "configuration, processor, tokenizer or template": (profile.model.settings_hash, settings),
        "text tower": (profile.model.text_tower_hash, text_tower),
    }
    for what, (expected, found) in own.items():
        if expected != found:
            raise PruningError(
                f"profile {name} was fitted to another model ({profile.model.path}): {what} {short(expected)}, here "
                f"{short(found)}; calibrate this one, or leave pruning.profile out"
            )


def check_target(path: Path, overwrite: bool) -> None:
    """Check, before minutes of measuring, that a profile may be written to a file.

    Raises:
        OutputError: for a file that is there and no profile, or one that may not be replaced; for a shipped folder.
    """
    if is_shipped(path):
        raise OutputError(f"{path} lies among the shipped configurations; write the profile somewhere else")
    if not path.exists():
        return
    try:
        read_profile(path)
    except PruningError:
        raise OutputError(
            f"{path} is in the way: it is no profile as prunetune calibrate wrote it; move it, or choose another file"
        ) from None
    if not overwrite:
        raise OutputError(f"{path} holds a profile; choose another file, or give --overwrite")


def write_profile(path: Path, profile: Profile, overwrite: bool = False) -> None:
    """Write a profile, whole or not at all; raises OutputError as :func:`check_target`, or if the disk is full."""
    check_target(path, overwrite)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, profile.to_text())
