"""Finished arms, as a comparison reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.metrics.averages import Average, average
from prunetune.evaluation.records import (
    Manifest,
    read_manifest,
    read_results,
)
from prunetune.evaluation.report.rows import check_results_hash, check_rows, scored_again
from prunetune.evaluation.report.tables.table import Projector
from prunetune.evaluation.tasks.base import Scored
from prunetune.models.record import portable, told_pruning
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
        parts: of an arm whose benchmarks were evaluated into a folder each, the arm of each folder; the manifest is
            then the first one's, on all benchmarks.
    """

    folder: Path
    manifest: Manifest
    answers: Mapping[str, list[Scored]]
    ids: list[str]
    rescored: Mapping[str, int] = field(default_factory=dict)
    parts: tuple[EvaluatedArm, ...] = ()

    @property
    def cells(self) -> tuple[EvaluatedArm, ...]:
        """The arm of each folder that it was read from."""
        return self.parts or (self,)

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
        return self.manifest.pruning.dense and not self.tuned

    @property
    def kept(self) -> float:
        """The mean number of visual tokens that reached the LLM."""
        assert self.manifest.kept_tokens is not None  # a finished arm has them
        return self.manifest.kept_tokens.mean

    @property
    def per_layer(self) -> float | None:
        """The mean number of visual tokens that a layer of the LLM processed; None where no stage drops any."""
        own = self.manifest.llm_tokens
        return None if own is None else own.average

    @property
    def tokens(self) -> float:
        """The mean number of visual tokens that the LLM pays for: those of its mean layer."""
        return self.kept if self.per_layer is None else self.per_layer

    @property
    def method(self) -> str:
        """What drops tokens: the pruner, and stages behind it; "dense" where nothing does."""
        return self.manifest.pruning.method

    @property
    def budget(self) -> str:
        """The budget as it was asked for; empty without pruning."""
        return self.manifest.pruning.budget

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
        stages = self.manifest.pruning.stages
        name = "dense" if self.manifest.pruning.dense else self.pruner
        options = []
        for key, value in self.manifest.pruning.options.items():
            options.append(f"{key}={value}")
        if self.manifest.pruning.choose_with != "tuned":
            options.append(f"chosen with the {self.manifest.pruning.choose_with} projector")
        # Only options that were set: the method's own defaults are its name.
        if options:
            name += f" ({', '.join(options)})"
        inside = " then ".join(stage.label for stage in stages)
        if not stages:
            return name
        return inside if self.pruner == "identity" and not options else f"{name} then {inside}"

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
        if target.get("pruner") == "identity" and not target.get("stages"):
            return " + projector tuned without pruning"
        # The adapter's own word, which another version may have written.
        return f" + tuned projector (for {told_pruning(target)})"

    def average(self) -> Average:
        """Return the mean scores in percent of all items that have one, overall and by source."""
        scores, sources = [], []
        for name, answers in self.answers.items():
            for one in answers:
                scores.append(one.score)
                # One task's sources need no prefix.
                sources.append(f"{name}/{one.item.source}" if len(self.answers) > 1 else one.item.source)
        return average(scores, sources)


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
