"""What an evaluation leaves behind, typed: the rows of results.jsonl, and the manifest that says how they came about.

Both files are read and written here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator

from prunetune.configs import Backend, ModelConfig
from prunetune.data_recipes.sampling import VideoSampling
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import file_hash, read_json, read_lines
from prunetune.models.seal import SEAL, sealed, why_unsealed
from prunetune.outputs import write_text
from prunetune.pruning.spec import PruningSpec
from prunetune.reading import shown

RESULTS = "results.jsonl"
MANIFEST = "manifest.json"
FORMAT: Literal[2] = 2
"""Of the two files: raise it when a reader of today would misread what is written."""
UNSEALED: Literal[1] = 1
"""The format of versions before the seals: read, and compared with arms of its own format alone."""
_OUTCOME = ("metrics", "kept_tokens", "llm_tokens", "notes", "items_per_second", "results_hash")
_SEALED = ("profile", "original_projector_hash", "projectors", "text_tower_hash", "prunetune", "results_hash")


class _Record(BaseModel):
    # Unknown fields are errors, and nothing is converted: a file that another version wrote is refused, not guessed at.
    # JSON as Python reads it has NaN and Infinity; no score of ours is one, and a mean with one says nothing.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# In the order of its keys in the file, which is part of the format: equal arms are equal files.
class Result(_Record):
    """One row of results.jsonl: a question, what the arm said to it, and its score.

    Attributes:
        task: the benchmark's name.
        id: the item's id within it.
        source: which part of the benchmark the item belongs to.
        image: reference of its image; None asks about text alone.
        question: the prompt as it was asked.
        answer: what the scorer compared with, JSON values; None where the answer is hidden.
        prediction: what the arm said.
        score: from 0 to 1; None where the answer is hidden or only a whole set has a score.
        kept: how many visual tokens reached the LLM.
        kept_per_frame: of a video, how many of each frame did; not in the file otherwise.
        notes: what the pruner noted of the item by name, such as ``ran_dry``; not in the file if that is nothing.
        kinds: further kinds of question that it is one of, for breakdowns; not in the file if there are none.
        layers: with stages inside the LLM, how many visual tokens each of its layers processed; not in the file
            otherwise.
    """

    task: str
    id: str
    source: str
    image: str | None
    question: str
    answer: Any
    prediction: str
    score: float | None
    kept: int
    kept_per_frame: list[int] | None = None
    # Made by a factory: a default that stands there is copied for every row, which takes longer than reading it.
    notes: dict[str, float] = Field(default_factory=dict)
    kinds: dict[str, str] = Field(default_factory=dict)
    layers: list[int] | None = None

    @property
    def key(self) -> tuple[str, str]:
        """The task and the id, which no two rows share."""
        return self.task, self.id

    def to_line(self) -> str:
        """Return the row as a line of JSON."""
        # Not pydantic's own JSON, which puts no space after a comma: a folder that an earlier version began would then
        # hold two kinds of lines, and equal arms would no longer be equal files.
        left_out = {name for name in ("kept_per_frame", "layers") if getattr(self, name) is None}
        if not self.notes:
            left_out.add("notes")
        if not self.kinds:
            left_out.add("kinds")
        return json.dumps(self.model_dump(exclude=left_out)) + "\n"


class TaskRecord(_Record):
    """Which questions of a benchmark were asked, and how; ``hash`` is a SHA-256 of the items in their order."""

    items: int
    hash: str
    protocol: str
    prompt: str


class TaskSummary(_Record):
    """What an arm reached on one benchmark.

    Attributes:
        metrics: the benchmark's own.
        interval_95: bootstrap interval of the mean score in percent, over images; None where items have no score.
        upload: name of the file for the benchmark's server, where there is one.
    """

    # Any, since every benchmark has metrics of its own: POPE's are nested by category, MME's are points.
    metrics: dict[str, Any]
    # A list and no tuple: strict validation takes JSON's arrays as they are.
    interval_95: list[float] | None
    upload: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_json(cls, values: Any) -> Any:
        # In the file the metrics stand beside the other two, one flat object per task as people read it.
        if not isinstance(values, dict) or "metrics" in values:
            return values
        nested: dict[str, Any] = {"metrics": {}}
        for name, value in values.items():
            if name in ("interval_95", "upload"):
                nested[name] = value
            else:
                nested["metrics"][name] = value
        return nested

    @model_serializer
    def _to_json(self) -> dict[str, Any]:
        values = {**self.metrics, "interval_95": self.interval_95}
        if self.upload is not None:
            values["upload"] = self.upload
        return values


class ProjectorRecord(_Record):
    """Which projector an arm ran with.

    Attributes:
        adapter: folder of the recalibration; None is the base's own.
        hash: SHA-256 of its tensors as they were loaded.
        tuned_for: the pruning that it was recalibrated for.
        stored_hash: SHA-256 of the recalibration's tensors as the adapter's file holds them.
        trained_in: the dtype that it was recalibrated in; scores shift where the arm runs in another.
        elastic: the settings that it was recalibrated for, of a recalibration for several.
        strength: where it lies between the base's projector and the recalibrated one, if it was dialled.
        soup: of how many projectors it is the mean, if it is one.
    """

    adapter: str | None
    hash: str
    # No PruningSpec: it is the adapter's word, which an earlier version with other options may have written.
    tuned_for: dict[str, Any] | None
    stored_hash: str | None = None
    trained_in: str | None = None
    # Left out where there is none: manifests of before there were any stay, to the byte.
    elastic: dict[str, Any] | None = Field(None, exclude_if=lambda elastic: elastic is None)
    strength: float | None = Field(None, exclude_if=lambda strength: strength is None)
    soup: int | None = Field(None, exclude_if=lambda soup: soup is None)


# More than a mean: methods that decide by the image how many to keep differ between images as much as between budgets.
class KeptTokens(_Record):
    """How many visual tokens of an item reached the LLM, over all items."""

    mean: float
    min: int
    max: int


class LayerTokens(_Record):
    """How many visual tokens of an item layers of the LLM processed, means over all items; merged ones included.

    Attributes:
        final: in the last layer.
        average: the mean over the layers.
        layers: in each of them.
    """

    final: float
    average: float
    layers: list[float]


class PluginRecord(_Record):
    """A plug-in that was loaded: its name, its package's version, and the SHA-256 of its source."""

    name: str
    version: str | None
    sha256: str


class CodeRecord(_Record):
    """Which prunetune ran: its version, a SHA-256 of its source and, for people, the commit of a checkout."""

    version: str
    sha256: str
    commit: str | None
    dirty: bool | None


class Manifest(_Record):
    """Everything that decides an arm's numbers and, once it is complete, what came out.

    Attributes:
        format: version of the two files.
        complete: whether every item was answered; ``metrics`` and what follows are there from then on.
        model: which model, and how it was loaded.
        frozen_hash: SHA-256 of the stored weights without the projector.
        original_projector_hash: SHA-256 of the projector that the base's files hold, whichever the arm ran with.
        projectors: the modules that the projector is made of.
        settings_hash: SHA-256 of configuration, processor, tokenizer and template files.
        template_hash: SHA-256 of the chat template that prompts were made with.
        projector: which projector.
        pruning: pruner and budget, with the options that ran.
        profile: seal of the profile that options came from, and what it was fitted on; None if none was named.
        text_tower_hash: SHA-256 of the text tower that the pruner reads; None if it reads none.
        tasks: which questions, by benchmark.
        batch_size: items per step, which moves scores in half precision.
        max_new_tokens: longest answer.
        share_prefix: whether what questions about one image begin with was computed once, which moves last bits; not in
            the file where it was not.
        backend: how answers were generated, which moves last bits; not in the file where it was plain.
        backend_options: what it was told; not in the file if that is nothing.
        image_processor: class of the image processor, since fast and slow ones differ in their last bits.
        features: seal of the feature cache that was read in place of pixels; None, and not in the file, without one.
        video: which frames of videos were looked at; None, and not in the file, where no task has videos.
        device: name of the GPU, or the CPU's architecture.
        versions: of the libraries that compute.
        prunetune: which version of this package ran.
        plugins: what was loaded from outside this package.
        metrics: what was reached, by benchmark.
        kept_tokens: visual tokens that reached the LLM.
        llm_tokens: those that its layers processed, where stages drop some between layers; None, and not in the file,
            where every layer processed all.
        notes: by benchmark, means of what the pruner noted of the items; not in the file if that is nothing.
        items_per_second: of the last run; None if it had nothing left to do.
        results_hash: SHA-256 of results.jsonl.
    """

    format: Literal[1, 2] = FORMAT
    complete: bool = False
    model: ModelConfig
    frozen_hash: str
    original_projector_hash: str | None = None
    projectors: list[str] | None = None
    settings_hash: str
    template_hash: str
    projector: ProjectorRecord
    pruning: PruningSpec
    profile: dict[str, Any] | None = None
    text_tower_hash: str | None = None
    tasks: dict[str, TaskRecord]
    batch_size: int
    max_new_tokens: int
    share_prefix: bool = False
    backend: Backend = "plain"
    backend_options: dict[str, Any] = {}
    image_processor: str
    features: str | None = None
    video: VideoSampling | None = None
    device: str
    versions: dict[str, str]
    prunetune: CodeRecord | None = None
    plugins: list[PluginRecord] = []
    metrics: dict[str, TaskSummary] | None = None
    kept_tokens: KeptTokens | None = None
    llm_tokens: LayerTokens | None = None
    notes: dict[str, dict[str, float]] = {}
    items_per_second: float | None = None
    results_hash: str | None = None

    # Tables and plots read both without asking; a hand that set "complete" is noticed here and not there.
    @model_validator(mode="after")
    def _has_what_came_out(self) -> Manifest:
        if self.complete and (self.metrics is None or self.kept_tokens is None):
            raise ValueError("it says complete, and has no metrics or no kept_tokens")
        if self.complete and self.pruning.stages and self.llm_tokens is None:
            raise ValueError("it says complete, and has stages and no llm_tokens")
        return self

    @model_validator(mode="after")
    def _has_its_links(self) -> Manifest:
        if self.format == UNSEALED:
            return self
        needed = ["original_projector_hash", "projectors", "prunetune"]
        if self.complete:
            needed.append("results_hash")
        lacking = [name for name in needed if getattr(self, name) is None]
        if lacking:
            raise ValueError(f"it lacks {', '.join(lacking)}, which format {FORMAT} has")
        return self

    def finished(
        self,
        metrics: dict[str, TaskSummary],
        kept_tokens: KeptTokens,
        items_per_second: float | None,
        results_hash: str | None = None,
        notes: dict[str, dict[str, float]] | None = None,
        llm_tokens: LayerTokens | None = None,
    ) -> Manifest:
        """Return the manifest of the complete arm."""
        return self.model_copy(
            update={
                "complete": True,
                "metrics": metrics,
                "kept_tokens": kept_tokens,
                "llm_tokens": llm_tokens,
                "notes": notes or {},
                "items_per_second": items_per_second,
                "results_hash": results_hash,
            }
        )

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers as JSON values: the fields that are there before the first answer."""
        # Not the outcome: an arm that is gone on with has none yet.
        values = self.model_dump(exclude={"complete", *_OUTCOME})
        if self.prunetune is not None:
            # The source's hash says what ran; a commit of the documentation changes nothing.
            values["prunetune"] = {"version": self.prunetune.version, "sha256": self.prunetune.sha256}
        return values

    def to_json(self) -> dict[str, Any]:
        """Return the file's content."""
        # An unfinished arm has no outcome; a null there would read as one that was measured and empty.
        left_out = set() if self.complete else set(_OUTCOME)
        if not self.plugins:  # as of an arm of a version that knew none
            left_out.add("plugins")
        for name in ("features", "video", "llm_tokens"):
            if getattr(self, name) is None:
                left_out.add(name)
        if not self.share_prefix:
            left_out.add("share_prefix")
        if self.backend == "plain":
            left_out.add("backend")
        for name in ("backend_options", "notes"):
            if not getattr(self, name):
                left_out.add(name)
        values = self.model_dump(exclude=left_out)
        if self.format != UNSEALED:
            return sealed(values)
        for name in _SEALED:  # as the earlier version wrote it, to the byte
            values.pop(name, None)
        # Of what it had not heard of its file says nothing.
        values["projector"] = self.projector.model_dump(exclude_unset=True)
        values["model"] = self.model.model_dump(exclude_unset=True)
        values["pruning"] = self.pruning.model_dump(exclude_unset=True)
        return values


def read_results(folder: str | Path) -> list[Result]:
    """Return an arm's rows; raises TaskError naming a line that is no row."""
    # Every row is checked, which takes 3 microseconds: an edited file must not end as a number in somebody's table.
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise TaskError(f"{path} is missing; evaluate the arm again into another folder")
    rows = []
    for line, record in read_lines(path):
        rows.append(result_of(record, f"{path}, line {line}"))
    return rows


def result_of(record: Any, where: str) -> Result:
    """Return a row from its JSON object; raises TaskError if it is none, beginning with ``where``."""
    return _validated(Result, record, where)


def write_results(folder: Path, rows: Iterable[Result]) -> None:
    """Write an arm's rows, whole or not at all."""
    write_text(folder / RESULTS, "".join(row.to_line() for row in rows))


def read_manifest(folder: str | Path) -> Manifest:
    """Return the manifest of a finished arm.

    Raises:
        TaskError: if the folder holds no arm, an unfinished one, or one that this version can't read.
    """
    # Missing, unreadable, unfinished, in this order: each has something else to be done about it.
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise TaskError(f"{folder} is no evaluated arm: {MANIFEST} is missing; run prunetune evaluate first")
    manifest = read_begun(folder)
    if not manifest.complete:
        raise TaskError(f"the arm in {folder} is not finished; run the same prunetune evaluate again, it goes on")
    return manifest


def read_begun(folder: str | Path) -> Manifest:
    """Return a manifest whether its arm is finished or not; raises TaskError if this version can't read it."""
    path = Path(folder) / MANIFEST
    values = read_json(path)
    if not isinstance(values, dict):
        raise TaskError(f"{path} is no manifest: it holds {type(values).__name__}, not an object")
    # Before anything else is looked at: of another format every other complaint would be beside the point.
    if values.get("format") not in (UNSEALED, FORMAT):
        raise TaskError(
            f"{path} has format {values.get('format')!r}, this version reads {UNSEALED} and {FORMAT}; evaluate the arm "
            "again into another folder, or read it with the version that wrote it"
        )
    if values["format"] == FORMAT:
        wrong = why_unsealed(values)
        if wrong is not None:
            raise TaskError(f"{path} can't be trusted: {wrong}; evaluate the arm again into another folder")
        del values[SEAL]
    return _validated(Manifest, values, str(path))


def results_hash(folder: str | Path) -> str:
    """Return the SHA-256 of an arm's results.jsonl."""
    return file_hash(Path(folder) / RESULTS)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest, whole or not at all."""
    write_text(folder / MANIFEST, json.dumps(manifest.to_json(), indent=2) + "\n")


_Kind = TypeVar("_Kind", bound=_Record)


def _validated(kind: type[_Kind], values: Any, where: str) -> _Kind:
    """Return a record; raises TaskError in one line with every field that is wrong."""
    if not isinstance(values, dict):
        raise TaskError(f"{where}: expected an object, got {type(values).__name__}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        # pydantic's own text has three lines per field and an address of its documentation.
        wrong = [_complaint(detail) for detail in error.errors()]
        raise TaskError(
            f"{where}: {'; '.join(wrong)}; another version wrote it, evaluate the arm again into another folder"
        ) from None


def _complaint(detail: Any) -> str:
    """Return what is wrong with one field, in words."""
    field = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "missing":
        return f"the field {field} is missing"
    if detail["type"] == "extra_forbidden":
        return f"the field {field} is unknown"
    if not field:  # what the whole record is checked for
        return str(detail["ctx"]["error"])
    return f"the field {field} is {shown(detail['input'])}: {detail['msg']}"
