"""Re-scoring saved predictions without a model: ours, or LLaVA's answers.jsonl, against the published annotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.report.predictions import paired, read_predictions
from prunetune.evaluation.tasks import get_task
from prunetune.evaluation.tasks.base import Benchmark, Item, Prediction, Scored

if TYPE_CHECKING:
    from prunetune.evaluation.report.grader import Grader


def score_file(
    name: str, predictions: Path, data: Path, protocol: str | None = None, grader: Grader | None = None
) -> dict[str, Any]:
    """Return every metric of a task for a file of predictions.

    Args:
        name: the task.
        predictions: JSONL file, see :func:`prunetune.evaluation.report.predictions.read_predictions`.
        data: folder with the published annotation files.
        protocol: whose rules; each task has its own, which None takes, and some can be scored by others.
        grader: judges open answers beside the task's own metrics.

    Raises:
        TaskError: for files that can't be used, predictions that don't match the questions one to one, a task whose
            answers are hidden, or a protocol the task does not follow.
    """
    # What the user may have got wrong is told in the order in which it is quickest to put right.
    task = get_task(name).under(protocol)
    _check(task, data)
    items = {item.id: item for item in task.read_answers(data)}
    found = read_predictions(predictions, name)
    by_item = _by_item(task, found, items, data, str(predictions))
    scored = _scored(task, by_item, items)
    summary = task.summarise(scored)
    grades = {} if grader is None else _graded(grader, task, scored)
    return {
        "task": name,
        "protocol": task.protocol,
        "prompt": _prompt(task, found),
        "items": len(scored),
        "missing": len(items) - len(by_item),
        "repeated": len(found) - len(by_item),
        **summary.metrics,
        **grades,
        "interval_95": summary.interval_95,
        "notes": [*task.notes, *(task.scorer.notes if task.scorer else ())],
    }


def _check(task: Benchmark, data: Path) -> None:
    """Check what can be checked before anything is read."""
    if task.hidden:
        raise TaskError(f"the answers of {task.name} are hidden; upload the file that prunetune evaluate wrote")
    if not data.is_dir():
        raise TaskError(f"{data} is no folder; give the folder of the benchmark's annotation files")


def _by_item(
    task: Benchmark, found: list[Prediction], items: dict[str, Item], data: Path, where: str
) -> dict[str, Prediction]:
    """Return the prediction of each item that has one."""
    pairing = task.pairing
    ids = [prediction.id for prediction in found]
    if pairing.ids is not None:  # other programs name questions in ways of their own
        ids = pairing.ids(found, data, where)
    # Nothing else stands for a prediction that is missing, unless nobody expects one of every item.
    complete = pairing.failed is None and not pairing.subset
    return paired(found, ids, list(items), where, complete=complete, first_counts=pairing.first_counts)


def _scored(task: Benchmark, by_item: dict[str, Prediction], items: dict[str, Item]) -> list[Scored]:
    """Return every item with its score: in the items' order, and behind them those without a prediction."""
    scored = []
    missing = []
    for number, item in items.items():
        if number in by_item:
            scored.append(task.score(by_item[number].text, item))
        elif not task.pairing.subset:
            # As LLaVA's scorer has it: wrong, and of no source, since it goes by the prompt that is not there.
            missing.append(task.score(task.pairing.failed or "", replace(item, source="missing")))
    return scored + missing


def _graded(grader: Grader, task: Benchmark, scored: Sequence[Scored]) -> dict[str, Any]:
    """Return what a grader says of the predictions."""
    if task.scorer is not None and task.scorer.judged is not None:
        # Beside the metrics of the rules alone, which are the same for everybody, every time.
        metrics = task.summarise(task.scorer.judged(scored, grader.choose)).metrics
        return {"graded": metrics, "grader": grader.model}
    triples = []
    for one in scored:
        triples.append((one.item.question, str(one.item.answer), one.prediction))
    return grader.grade(triples)


def _prompt(task: Benchmark, found: Sequence[Prediction]) -> str:
    """Return which variant was asked; the prompts themselves say whether OCR tokens were there."""
    # OCR tokens are worth points, so a number must say which of the two it is, whatever the task was called.
    asked = False
    for prediction in found:
        asked = asked or bool(prediction.prompt)
        if "OCR token" in prediction.prompt:
            return "question, reference OCR tokens, short answer"
    # Prompts without OCR tokens contradict the task that has them; a file without prompts contradicts nothing.
    return task.prompt.replace(", reference OCR tokens", "") if asked else task.prompt
