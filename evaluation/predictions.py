"""Saved predictions: our own results.jsonl, or LLaVA's answers.jsonl."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import read_lines


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        id: the question's id as the file has it.
        text: what the model said.
        prompt: what it was asked, empty if the file does not say.
        line: line of the file, from 1.
    """

    id: str
    text: str
    prompt: str
    line: int


def read_predictions(path: Path, task: str) -> list[Prediction]:
    """Return the predictions of one task in file order.

    Args:
        path: a JSONL file with ``question_id``, ``text`` and ``prompt`` (LLaVA's), or ``id``, ``prediction``,
            ``question`` and ``task`` (ours; rows of other tasks are not this task's and are left out), or ``id`` and
            ``pred`` (Video-ChatGPT's).
        task: the task's name.

    Raises:
        TaskError: for a missing file, an unknown format (naming the line), or no prediction.
    """
    if not path.is_file():
        raise TaskError(f"predictions file {path} does not exist")
    found = []
    for line, record in read_lines(path):
        text = next((record[name] for name in ("text", "prediction", "pred") if name in record), "")
        if not isinstance(text, str):
            raise TaskError(f"{path}, line {line}: the answer is no text but {text!r}")
        if "question_id" in record and "text" in record:
            found.append(Prediction(str(record["question_id"]), record["text"], str(record.get("prompt", "")), line))
        elif "id" in record and "prediction" in record:
            if record.get("task", task) == task:
                found.append(Prediction(str(record["id"]), record["prediction"], str(record.get("question", "")), line))
        elif "id" in record and "pred" in record:
            found.append(Prediction(str(record["id"]), record["pred"], str(record.get("question", "")), line))
        else:
            raise TaskError(
                f"{path}, line {line}: neither LLaVA's format (question_id, text, prompt) nor ours (id, prediction, "
                f"question); it has {', '.join(sorted(record))}"
            )
    if not found:
        raise TaskError(f"{path} holds no prediction of {task}")
    return found


def paired(
    predictions: list[Prediction],
    keys: list[str],
    questions: list[str],
    path: str,
    complete: bool = True,
    first_counts: bool = False,
) -> dict[str, Prediction]:
    """Return the prediction of every question; the two must match one to one.

    Where the annotations hold a question several times (``KEY``, ``KEY#2``, ...), so may the predictions.

    Args:
        predictions: all of them.
        keys: the question of each.
        questions: all questions.
        path: name of the predictions, for messages.
        complete: whether a question without a prediction is an error.
        first_counts: whether a repeated prediction is left out instead of being an error.

    Raises:
        TaskError: for an unknown or repeated question, naming the line, or questions without a prediction.
    """
    known = set(questions)
    found: dict[str, Prediction] = {}
    for prediction, key in zip(predictions, keys, strict=True):
        name, number = key, 2
        while key in found and f"{name}#{number}" in known:
            key, number = f"{name}#{number}", number + 1
        if key not in known:
            raise TaskError(f"{path}, line {prediction.line}: question {key!r} is not in the annotations")
        if key in found:
            if first_counts:
                continue
            raise TaskError(
                f"{path}, line {prediction.line}: question {key!r} was answered in line {found[key].line} already"
            )
        found[key] = prediction
    missing = [key for key in questions if key not in found]
    if missing and complete:
        raise TaskError(
            f"{path} has no prediction for {len(missing)} of {len(questions)} questions, such as {missing[0]!r}"
        )
    return found
