"""POPE: is an object in the picture? Three kinds of absent objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunetune.data_recipes.images import FolderImages
from prunetune.evaluation.files import find_file, read_lines, read_questions
from prunetune.evaluation.predictions import Prediction
from prunetune.evaluation.tasks.base import SHORT_ANSWER, Item, Pair, Task, TaskError, image_folder, register_task

CATEGORIES = ("adversarial", "popular", "random")
SOURCE = "https://github.com/AoiDragon/POPE/tree/main/output/coco (named coco_pope_CATEGORY.json)"
QUESTIONS = "llava_pope_test.jsonl"


def read_items(data: Path) -> list[Item]:
    """Return the questions of all categories; ids are ``CATEGORY/IMAGE/QUESTION``."""
    items: list[Item] = []
    seen: dict[str, int] = {}
    for category in CATEGORIES:
        path = find_file(data, f"coco_pope_{category}.json", SOURCE)
        for line, record in read_lines(path):
            name = _id(category, record["image"], record["text"])
            if name in seen:
                raise TaskError(f"{path}, line {line}: the question stands in line {seen[name]} already: {name!r}")
            seen[name] = line
            question = f"{record['text']}\n{SHORT_ANSWER}"
            items.append(Item(name, category, record["image"], question, record["label"]))
    return items


def says(prediction: str) -> str:
    """Return "yes" or "no": no if the first sentence has one of the words No, not and no."""
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score(prediction: str, item: Item) -> float:
    """Return 1 if yes or no is right."""
    return float(says(prediction) == item.answer)


def counts(pairs: list[Pair]) -> dict[str, Any]:
    """Return accuracy, precision, recall, F1 and yes-ratio, from 0 to 1, with the four counts.

    Where the published scorer divides by zero, the value is None.
    """
    table = {(said, label): 0 for said in ("yes", "no") for label in ("yes", "no")}
    for prediction, item in pairs:
        table[says(prediction), item.answer] += 1
    tp, fp, tn, fn = table["yes", "yes"], table["yes", "no"], table["no", "no"], table["no", "yes"]

    def share(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    precision, recall = share(tp, tp + fp), share(tp, tp + fn)
    f1 = None if precision is None or recall is None else share(2 * precision * recall, precision + recall)
    return {
        "items": len(pairs),
        "accuracy": share(tp + tn, len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_ratio": share(tp + fp, len(pairs)),
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
    }


def metrics(pairs: list[Pair]) -> dict[str, Any]:
    """Return the counts per category and the mean over categories."""
    categories = {c: counts([p for p in pairs if p[1].source == c]) for c in CATEGORIES}
    categories = {name: values for name, values in categories.items() if values["items"]}
    mean: dict[str, float | None] = {}
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        values = [category[name] for category in categories.values()]
        mean[name] = None if None in values or not values else sum(values) / len(values)
    return {"categories": categories, "mean": mean}


def keys(predictions: list[Prediction], data: Path, where: str) -> list[str]:
    """Return the item of each prediction: LLaVA's ids go through its question file, ours are the items' own."""
    if all(prediction.id.split("/")[0] in CATEGORIES for prediction in predictions):
        return [prediction.id for prediction in predictions]
    asked = {}
    path = find_file(data, QUESTIONS, "LLaVA's eval.zip, see its docs/Evaluation.md")
    for _, record in read_questions(path):
        question = record["text"].split("\n")[0]
        asked[str(record["question_id"])] = _id(record["category"], record["image"], question)
    unknown = next((p for p in predictions if p.id not in asked), None)
    if unknown is not None:
        raise TaskError(f"{where}, line {unknown.line}: question_id {unknown.id} is not in {path}")
    return [asked[prediction.id] for prediction in predictions]


def _id(category: str, image: str, question: str) -> str:
    return f"{category}/{image}/{question.strip()}"


register_task(
    Task(
        name="pope",
        protocol="llava",
        prompt="question, short answer",
        read=read_items,
        images=lambda data: FolderImages(image_folder(data, "val2014")),
        score=score,
        metrics=metrics,
        keys=keys,
        notes=(
            "predictions are paired with labels by category, picture and question; LLaVA's scorer pairs them by order",
            "a metric whose denominator is zero is null; LLaVA's scorer stops there",
        ),
        about="POPE on COCO: object hallucination (accuracy, F1)",
    )
)
