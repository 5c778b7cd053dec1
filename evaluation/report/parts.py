"""An arm whose benchmarks were evaluated into a folder each, as a table's cells are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.records import KeptTokens, Manifest, TaskRecord, TaskSummary
from prunetune.evaluation.report.arms import EvaluatedArm, read_arm
from prunetune.evaluation.report.comparable import check_one_arm
from prunetune.evaluation.tasks.base import Scored


def read_tasks(folders: Sequence[str | Path], rescore: bool = False, allow: Sequence[str] = ()) -> EvaluatedArm:
    """Read one arm whose benchmarks were evaluated into a folder each.

    Args:
        folders: of the evaluations.
        rescore: whether today's scorers count where they say something else than when it was evaluated.
        allow: fields that may differ, see :func:`~prunetune.evaluation.report.comparable.check_allowed`.

    Raises:
        TaskError: for a folder that can't be read, see :func:`read_arm`, or if the folders are not of one arm.
    """
    parts = [read_arm(folder, rescore) for folder in folders]
    first = parts[0]
    for part in parts[1:]:
        check_one_arm(first, part, allow)
    if len(parts) == 1:
        return first
    answers: dict[str, list[Scored]] = {}
    for part in parts:
        if set(answers) & set(part.answers):
            raise TaskError(f"{part.folder} holds a benchmark that another folder of the same arm holds as well")
        answers.update(part.answers)
    beside = all(part.folder.parent == first.folder.parent for part in parts)
    return EvaluatedArm(
        first.folder.parent if beside else first.folder,
        _joined([part.manifest for part in parts]),
        answers,
        [name for part in parts for name in part.ids],
        {name: count for part in parts for name, count in part.rescored.items()},
        tuple(parts),
    )


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
