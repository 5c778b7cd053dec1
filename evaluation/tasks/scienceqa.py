"""ScienceQA, test: multiple choice by letter, with and without pictures."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from prunetune.data_recipes.images import FolderImages
from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.tasks.base import LETTER, Item, Pair, Task, TaskError, image_folder, percent, register_task

LETTERS = "ABCDE"
SOURCE = "https://github.com/lupantech/ScienceQA (problems.json and pid_splits.json in data/scienceqa)"
QUESTIONS = "llava_test_CQM-A.json"
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")


def read_items(data: Path) -> list[Item]:
    """Return the test problems in the split's order, as LLaVA asks them."""
    asked = {}
    for record in read_json(find_file(data, QUESTIONS, "LLaVA's eval.zip, see its docs/Evaluation.md")):
        question = record["conversations"][0]["value"].replace("<image>", "").strip()
        asked[str(record["id"])] = f"{question}\n{LETTER}"
    items = read_answers(data)
    missing = [item.id for item in items if item.id not in asked]
    if missing:
        raise TaskError(f"{QUESTIONS} lacks {len(missing)} problems of the test split, such as {missing[0]}")
    return [replace(item, question=asked[item.id]) for item in items]


def read_answers(data: Path) -> list[Item]:
    """Return the test problems; the source says whether there is a picture ("image" or "text")."""
    problems = read_json(find_file(data, "problems.json", SOURCE))
    split = read_json(find_file(data, "pid_splits.json", SOURCE))["test"]
    items = []
    for number in split:
        problem = problems[number]
        image = f"{number}/{problem['image']}" if problem.get("image") else None
        answer = {"index": problem["answer"], "choices": len(problem["choices"])}
        items.append(Item(str(number), "text" if image is None else "image", image, problem["question"], answer))
    return items


def chosen(prediction: str, choices: int) -> int:
    """Return the chosen index, or -1: the letter alone, "X. ...", or one "The answer is X."."""
    if prediction in tuple(LETTERS):
        letter = prediction
    elif len(prediction) >= 3 and prediction[0] in LETTERS and prediction[1:3] == ". ":
        letter = prediction[0]
    else:
        found = _ANSWER_IS.findall(prediction)
        letter = found[0] if len(found) == 1 else ""
    return LETTERS.index(letter) if letter and letter in LETTERS[:choices] else -1


def score(prediction: str, item: Item) -> float:
    """Return 1 for the right choice."""
    return float(chosen(prediction, item.answer["choices"]) == item.answer["index"])


def metrics(pairs: list[Pair]) -> dict[str, float | None]:
    """Return accuracy in percent, of all problems and of those with a picture (what papers report)."""
    return {
        "accuracy": percent(score, pairs),
        "image_accuracy": percent(score, [pair for pair in pairs if pair[1].source == "image"]),
    }


register_task(
    Task(
        name="scienceqa",
        protocol="llava",
        prompt="context, question, choices, letter",
        read=read_items,
        answers=read_answers,
        images=lambda data: FolderImages(image_folder(data, "test")),
        score=score,
        metrics=metrics,
        failed="FAILED",
        notes=("a missing answer counts as wrong, and in no group, as in LLaVA's scorer",),
        about="ScienceQA test: multiple choice (total and IMG accuracy)",
    )
)
