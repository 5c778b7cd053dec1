"""Re-scoring saved predictions without a model: ours, or LLaVA's answers.jsonl, against the published annotations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.grader import Grader
from prunetune.evaluation.intervals import bootstrap_interval
from prunetune.evaluation.predictions import paired, read_predictions
from prunetune.evaluation.sources import read_items
from prunetune.evaluation.tasks import get_task
from prunetune.evaluation.tasks.base import Pair, Task


def score_file(
    name: str, predictions: Path, data: Path, protocol: str | None = None, grader: Grader | None = None
) -> dict[str, Any]:
    """Return every metric of a task for a file of predictions.

    Args:
        name: the task.
        predictions: JSONL file, see :func:`evaluation.predictions.read_predictions`.
        data: folder with the published annotation files.
        protocol: whose rules; each task has one, which None takes.
        grader: judges open answers beside the task's own metrics.

    Raises:
        TaskError: for files that can't be used, predictions that don't match the questions one to one, a task whose
            answers are hidden, or a protocol the task does not follow.
    """
    task = get_task(name)
    if protocol not in (None, task.protocol):
        raise TaskError(f"{name} is scored by protocol {task.protocol!r}, not {protocol!r}")
    if task.hidden:
        raise TaskError(f"the answers of {name} are hidden; upload the file that prunetune evaluate wrote")
    if not data.is_dir():
        raise TaskError(f"{data} is no folder; give the folder of the benchmark's annotation files")
    items = {item.id: item for item in read_items(task, data, answers_only=True)}
    found = read_predictions(predictions, name)
    where = str(predictions)
    if task.keys is not None:
        keys = task.keys(found, data, where)
    else:
        keys = [task.key(p, f"{where}, line {p.line}") if task.key else p.id for p in found]
    by_item = paired(found, keys, list(items), where, complete=task.failed is None, first_counts=task.first_counts)
    missing = [number for number in items if number not in by_item]
    pairs = [(by_item[n].text, item) for n, item in items.items() if n in by_item]
    # As LLaVA's scorer has it: wrong, and of no source, since it goes by the prompt that is not there.
    pairs += [(task.failed or "", replace(items[number], source="missing")) for number in missing]
    return {
        "task": name,
        "protocol": task.protocol,
        "prompt": _prompt(task, [prediction.prompt for prediction in found]),
        "items": len(pairs),
        "missing": len(missing),
        "repeated": len(found) - len(by_item),
        **task.measure(pairs),
        **(grader.grade((item.question, str(item.answer), text) for text, item in pairs) if grader else {}),
        "interval_95": interval(task, pairs),
        "notes": list(task.notes),
    }


def interval(task: Task, pairs: list[Pair]) -> list[float] | None:
    """Return the 95 % bootstrap interval over pictures of the mean score in percent; None without scores."""
    if task.score is None or not pairs:
        return None
    scores = np.array([task.score(prediction, item) for prediction, item in pairs])
    images = np.array([str(item.image or item.id) for _, item in pairs])
    return list(bootstrap_interval(scores, images, seed=0))


def _prompt(task: Task, prompts: list[str]) -> str:
    """Return which variant was asked; the prompts themselves say whether OCR tokens were there."""
    if any("OCR token" in prompt for prompt in prompts):
        return "question, reference OCR tokens, short answer"
    return task.prompt.replace(", reference OCR tokens", "") if any(prompts) else task.prompt
