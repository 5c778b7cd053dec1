"""Finished arms, as a comparison reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.metrics.averages import Average, average
from prunetune.evaluation.records import Manifest, read_manifest, read_results
from prunetune.evaluation.report.rows import check_results_hash, check_rows, check_scores
from prunetune.models.record import portable
from prunetune.pruning.spec import PruningSpec


@dataclass(frozen=True)
class EvaluatedArm:
    """A finished evaluation.

    Attributes:
        folder: where it lies.
        manifest: how its numbers came about.
        ids: task and id of every item, in order.
        sources: source of every item, with its task where there are several.
        images: image of every item, or its id where it has none: what the bootstrap resamples.
        scores: score of every item (M,), from 0 to 1.
    """

    folder: Path
    manifest: Manifest
    ids: list[str]
    sources: list[str]
    images: list[str]
    scores: np.ndarray

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
    def label(self) -> str:
        """Method, options that are set, and whether it is tuned."""
        name = "dense" if self.pruner == "identity" else self.pruner
        options = []
        for key, value in self.manifest.pruning.options.items():
            options.append(f"{key}={value}")
        if self.manifest.pruning.choose_with != "tuned":
            options.append(f"chosen with the {self.manifest.pruning.choose_with} projector")
        # Only options that were set: the method's own defaults are its name.
        if options:
            name += f" ({', '.join(options)})"
        return name + self._tuned_for()

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
        """Return the mean scores in percent, overall and by source."""
        # As Python's floats, which are added up as when the metrics of the manifest were made.
        return average(self.scores.tolist(), self.sources)

    def only(self, mask: np.ndarray) -> EvaluatedArm:
        """Return the arm with the items where ``mask`` (M,) is true."""
        return replace(
            self,
            ids=list(compress(self.ids, mask)),
            sources=list(compress(self.sources, mask)),
            images=list(compress(self.images, mask)),
            scores=self.scores[mask],
        )


def read_arm(folder: str | Path) -> EvaluatedArm:
    """Read a finished arm; raises TaskError if it is missing, unfinished, short of rows, or was edited."""
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
    hidden = sorted({row.task for row in rows if row.score is None})
    if hidden:
        raise TaskError(
            f"{folder}: {', '.join(hidden)} has no score per item (hidden answers, or a score of the whole set); "
            "see its upload file or the metrics in manifest.json"
        )
    check_scores(folder, manifest, rows)
    check_results_hash(folder, manifest)
    values: dict[str, list[Any]] = {"ids": [], "sources": [], "images": [], "scores": []}
    for row in rows:
        values["ids"].append(f"{row.task}/{row.id}")
        # One task's sources need no prefix, and a table of it stays narrow.
        values["sources"].append(f"{row.task}/{row.source}" if len(manifest.tasks) > 1 else row.source)
        # A question about text alone hangs together with no other, so it is a cluster of its own.
        values["images"].append(str(row.image or row.id))
        values["scores"].append(row.score)
    scores = np.array(values["scores"], dtype=float)
    return EvaluatedArm(folder, manifest, values["ids"], values["sources"], values["images"], scores)
