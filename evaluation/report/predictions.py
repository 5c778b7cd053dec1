"""Saved predictions: our own results.jsonl, LLaVA's answers.jsonl, or Video-ChatGPT's; and which item each is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import read_lines
from prunetune.evaluation.tasks.base import Prediction


def read_predictions(path: Path, task: str) -> list[Prediction]:
    """Return the predictions of one task in file order.

    Args:
        path: a JSONL file with ``question_id``, ``text`` and ``prompt`` (LLaVA's), or ``id``, ``prediction``,
            ``question`` and ``task`` (ours; rows of other tasks are not this task's and are left out), or ``id`` and
            ``pred`` (Video-ChatGPT's), or ``image_id`` and ``caption`` (COCO's captions).
        task: the task's name.

    Raises:
        TaskError: for a missing file, an unknown format (naming the line), or no prediction.
    """
    if not path.is_file():
        raise TaskError(f"predictions file {path} does not exist")
    found = []
    for line, record in read_lines(path):
        prediction = _read(record, line, f"{path}, line {line}")
        # An answer is one to the benchmark, whatever the protocol that scored it then.
        if str(record.get("task", task)).partition("@")[0] == task.partition("@")[0]:
            found.append(prediction)
    # Rows of other tasks are left out without a word, so a file of nothing else would look like one that lacks answers.
    if not found:
        raise TaskError(f"{path} holds no prediction of {task}")
    return found


def _read(record: dict[str, Any], line: int, where: str) -> Prediction:
    """Return a line's prediction; raises TaskError for a line of no known format."""
    # A failed request of another program is often saved as null; no scorer would say which line it was.
    for name in ("text", "prediction", "pred", "caption"):
        if name in record:
            if not isinstance(record[name], str):
                raise TaskError(f"{where}: the answer is no text but {record[name]!r}")
            break
    # By the keys and not by the file's name: each of the three programs names its files as it is told to.
    if "question_id" in record and "text" in record:
        return _prediction(record, line, "question_id", "text", "prompt")
    if "id" in record and "prediction" in record:
        return _prediction(record, line, "id", "prediction", "question")
    if "id" in record and "pred" in record:
        return _prediction(record, line, "id", "pred", "question")
    if "image_id" in record and "caption" in record:
        return _prediction(record, line, "image_id", "caption", "question")
    raise TaskError(
        f"{where}: neither LLaVA's format (question_id, text, prompt) nor ours (id, prediction, question); it has "
        f"{', '.join(sorted(record))}"
    )


def _prediction(record: dict[str, Any], line: int, name: str, text: str, prompt: str) -> Prediction:
    return Prediction(str(record[name]), record[text], str(record.get(prompt, "")), line)


def paired(
    predictions: list[Prediction],
    ids: list[str],
    questions: list[str],
    path: str,
    complete: bool = True,
    first_counts: bool = False,
) -> dict[str, Prediction]:
    """Return the prediction of every question; the two must match one to one.

    Where the annotations hold a question several times (``ID``, ``ID#2``, ...), so may the predictions.

    Args:
        predictions: all of them.
        ids: the question of each.
        questions: all questions.
        path: name of the predictions, for messages.
        complete: whether a question without a prediction is an error.
        first_counts: whether a repeated prediction is left out instead of being an error.

    Raises:
        TaskError: for an unknown or repeated question, naming the line, or questions without a prediction.
    """
    # By name and never by position: two files that were sorted differently would otherwise pair the wrong answers, and
    # a yes/no benchmark would still come out near 50 %.
    known = set(questions)
    found: dict[str, Prediction] = {}
    for prediction, name in zip(predictions, ids, strict=True):
        key = _next_free(name, found, known)
        if key not in known:
            raise TaskError(f"{path}, line {prediction.line}: question {key!r} is not in the annotations")
        if key not in found:
            found[key] = prediction
        # An answer that is there twice may come from two runs in one file; which of them counts nobody said.
        elif not first_counts:
            raise TaskError(
                f"{path}, line {prediction.line}: question {key!r} was answered in line {found[key].line} already"
            )
    # A mean over the questions that were answered could be made better by leaving the hard ones out.
    missing = [key for key in questions if key not in found]
    if missing and complete:
        raise TaskError(
            f"{path} has no prediction for {len(missing)} of {len(questions)} questions, such as {missing[0]!r}"
        )
    return found


def _next_free(name: str, found: dict[str, Prediction], known: set[str]) -> str:
    """Return the first question of a name that has no prediction yet, or the last of that name."""
    key = name
    number = 2
    while key in found and f"{name}#{number}" in known:
        key = f"{name}#{number}"
        number += 1
    return key
