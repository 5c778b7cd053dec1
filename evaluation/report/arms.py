"""Finished arms, as a comparison reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.metrics.averages import Average, average
from prunetune.evaluation.records import (
    KeptTokens,
    Manifest,
    TaskRecord,
    TaskSummary,
    read_manifest,
    read_results,
)
from prunetune.evaluation.report.rows import check_results_hash, check_rows, scored_again
from prunetune.evaluation.report.tables.table import Projector
from prunetune.evaluation.tasks.base import Scored
from prunetune.models.record import portable
from prunetune.pruning.spec import PruningSpec


@dataclass(frozen=True)
class EvaluatedArm:
    """A finished evaluation.

    Attributes:
        folder: where it lies.
        manifest: how its numbers came about.
        answers: what it said, with scores, by benchmark in the order of the questions. A score is None where the
            answer is hidden or only a whole set has one.
        ids: task and id of every item, in order.
        rescored: how many answers of a benchmark have another score than when they were given.
    """

    folder: Path
    manifest: Manifest
    answers: Mapping[str, list[Scored]]
    ids: list[str]
    rescored: Mapping[str, int] = field(default_factory=dict)

    @property
    def pruner(self) -> str:
        """The method's name."""
        return self.manifest.pruning.pruner

    @property
    def tuned(self) -> bool:
        """Whether the projector comes from a recalibration, as an adapter or merged into an export."""
        return self.manifest.projector.adapter is not None or self.manifest.projector.tuned_for is not None

    @property
    def dense(self) -> bool:
        """Whether nothing is pruned and the projector is the base's."""
        return self.pruner == "identity" and not self.tuned

    @property
    def kept(self) -> float:
        """The mean number of visual tokens that reached the LLM."""
        assert self.manifest.kept_tokens is not None  # a finished arm has them
        return self.manifest.kept_tokens.mean

    @property
    def budget(self) -> str:
        """The budget as it was asked for; empty without pruning."""
        return "" if self.pruner == "identity" else str(self.manifest.pruning.keep)

    @property
    def projector(self) -> Projector:
        """Whose projector it ran with."""
        if not self.tuned:
            return "training-free"
        record = self.manifest.projector
        if record.elastic is not None:
            return "elastic"
        own = self._projector() == " + tuned projector" and record.strength is None and record.soup is None
        return "tuned" if own else "other"

    @property
    def label(self) -> str:
        """Method, options that are set, and whether it is tuned."""
        return self.labelled()

    def labelled(self, method: str = "") -> str:
        """Return the label where the method with its options is called by a name of one's own."""
        return (method or self._method()) + self._tuned_for()

    def _method(self) -> str:
        name = "dense" if self.pruner == "identity" else self.pruner
        options = []
        for key, value in self.manifest.pruning.options.items():
            options.append(f"{key}={value}")
        if self.manifest.pruning.choose_with != "tuned":
            options.append(f"chosen with the {self.manifest.pruning.choose_with} projector")
        # Only options that were set: the method's own defaults are its name.
        if options:
            name += f" ({', '.join(options)})"
        return name

    @property
    def adapter(self) -> str:
        """What tells the arm's projector from others that are described alike: its run's folder, or its hash."""
        record = self.manifest.projector
        if record.adapter is None:
            return record.hash[:8]
        parts = [part for part in record.adapter.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        if len(parts) > 1 and parts[-1] == "adapter":  # the folder that a recalibration puts it into
            parts.pop()
        return parts[-1] if parts else record.hash[:8]

    def _tuned_for(self) -> str:
        """Return " + tuned projector", and for which pruning if that is another than the arm's; or " + elastic"."""
        # A projector may be used at a budget it was not tuned for, and a table would not tell the two apart.
        if not self.tuned:
            return ""
        return self._projector() + self._made()

    def _made(self) -> str:
        """Return how the projector was made, where that is not by one training for this very choice."""
        record, told = self.manifest.projector, []
        if record.strength is not None:
            told.append(f"strength {record.strength:g}")
        if record.soup is not None:
            told.append(f"mean of {record.soup}")
        trained = (record.tuned_for or {}).get("choose_with", "tuned")
        if trained != self.manifest.pruning.choose_with:
            told.append(f"trained on the {trained} one's choice")
        return f" [{', '.join(told)}]" if told else ""

    def _projector(self) -> str:
        """Return which projector it is."""
        target = self.manifest.projector.tuned_for
        if self.manifest.projector.elastic is not None:
            return " + elastic projector"
        own = self.manifest.pruning.model_dump(exclude={"choose_with"})
        if target is not None:  # an earlier version knew fewer fields, and ran as their defaults say
            target = {**PruningSpec().model_dump(), **target}
            target.pop("choose_with", None)
        if target is not None and target.get("text_tower") is not None:
            own["text_tower"] = portable(own["text_tower"])  # as the adapter's record has it
        if target is None or target == own:
            return " + tuned projector"
        if target.get("pruner") == "identity":
            return " + projector tuned without pruning"
        # The adapter's own word, which another version may have written.
        return f" + tuned projector (for {target.get('pruner')}, {target.get('keep')})"

    def average(self) -> Average:
        """Return the mean scores in percent of all items that have one, overall and by source."""
        scores, sources = [], []
        for name, answers in self.answers.items():
            for one in answers:
                scores.append(one.score)
                # One task's sources need no prefix.
                sources.append(f"{name}/{one.item.source}" if len(self.answers) > 1 else one.item.source)
        return average(scores, sources)


def read_tasks(folders: Sequence[str | Path], rescore: bool = False) -> EvaluatedArm:
    """Read one arm whose benchmarks were evaluated into a folder each.

    Raises:
        TaskError: for a folder that can't be read, see :func:`read_arm`, or if the folders are not of one arm.
    """
    parts = [read_arm(folder, rescore) for folder in folders]
    first = parts[0]
    own = _without_tasks(first)
    for part in parts[1:]:
        other = _without_tasks(part)
        for key in sorted({*own, *other}):
            if own.get(key) != other.get(key):
                raise TaskError(f"{first.folder} and {part.folder} are not of one arm: they differ in {key}")
    answers: dict[str, list[Scored]] = {}
    for part in parts:
        if set(answers) & set(part.answers):
            raise TaskError(f"{part.folder} holds a benchmark that another folder of the same arm holds as well")
        answers.update(part.answers)
    return EvaluatedArm(
        first.folder.parent if len(parts) > 1 else first.folder,
        _joined([part.manifest for part in parts]),
        answers,
        [name for part in parts for name in part.ids],
        {name: count for part in parts for name, count in part.rescored.items()},
    )


def _without_tasks(arm: EvaluatedArm) -> dict[str, Any]:
    values = arm.manifest.settings()
    # Which frames were looked at stands there of benchmarks with videos alone, and of those nothing is kept.
    return {name: value for name, value in values.items() if name not in ("tasks", "video", "features")}


def _joined(manifests: Sequence[Manifest]) -> Manifest:
    """Return the manifest of an arm on several benchmarks."""
    tasks: dict[str, TaskRecord] = {}
    metrics: dict[str, TaskSummary] = {}
    notes: dict[str, dict[str, float]] = {}
    total, items = 0.0, 0
    least, most = [], []
    for manifest in manifests:
        assert manifest.metrics is not None and manifest.kept_tokens is not None  # a finished arm has them
        tasks |= manifest.tasks
        metrics |= manifest.metrics
        notes |= manifest.notes
        number = sum(task.items for task in manifest.tasks.values())
        total += manifest.kept_tokens.mean * number
        items += number
        least.append(manifest.kept_tokens.min)
        most.append(manifest.kept_tokens.max)
    kept = KeptTokens(mean=total / items, min=min(least), max=max(most))
    return manifests[0].model_copy(update={"tasks": tasks, "metrics": metrics, "notes": notes, "kept_tokens": kept})


def read_arm(folder: str | Path, rescore: bool = False) -> EvaluatedArm:
    """Read a finished arm.

    Args:
        folder: where it lies.
        rescore: whether the scorers of today count where they say something else than when it was evaluated.

    Raises:
        TaskError: if it is missing, unfinished, short of rows, or was edited.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    rows = read_results(folder)
    expected = sum(task.items for task in manifest.tasks.values())
    # A file that was cut short is still one of whole lines, and its mean a number of other questions.
    if len(rows) != expected:
        raise TaskError(f"{folder} has {len(rows)} results, its manifest says {expected}; evaluate it again")
    if not rows:
        raise TaskError(f"{folder} holds no result; evaluate it with at least one item")
    check_rows(folder, manifest, rows)
    answers, rescored = scored_again(folder, manifest, rows, rescore)
    check_results_hash(folder, manifest)
    return EvaluatedArm(folder, manifest, answers, [f"{row.task}/{row.id}" for row in rows], rescored)
