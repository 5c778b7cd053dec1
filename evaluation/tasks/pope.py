"""POPE: is an object in the image? Three kinds of absent objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import find_file, read_lines, read_questions
from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_in_row
from prunetune.evaluation.metrics.metric import Metric, Tally, mean_of_groups, share, tallied
from prunetune.evaluation.readers import PublishedFiles, images_below
from prunetune.evaluation.tasks.base import (
    SHORT_ANSWER,
    Benchmark,
    Item,
    Pairing,
    Prediction,
    Scored,
    Scorer,
    register_task,
)

# Where the absent objects come from: those that often stand beside what is there, frequent ones, any.
CATEGORIES = ("adversarial", "popular", "random")
SHARES = ("accuracy", "precision", "recall", "f1", "yes_ratio")
SOURCE = "https://github.com/AoiDragon/POPE/tree/main/output/coco (named coco_pope_CATEGORY.json)"
QUESTIONS = "llava_pope_test.jsonl"


def read_items(data: Path) -> list[Item]:
    """Return the questions of all categories; ids are ``CATEGORY/IMAGE/QUESTION``."""
    items: list[Item] = []
    seen: dict[str, int] = {}
    for category in CATEGORIES:
        path = find_file(data, f"coco_pope_{category}.json", SOURCE)
        for line, record in read_lines(path):
            item = _item(category, record["image"], record["image"], record["text"], record["label"])
            # Counted twice it would weigh twice, and one saved prediction could not answer both.
            if item.id in seen:
                raise TaskError(
                    f"{path}, line {line}: the question stands in line {seen[item.id]} already: {item.id!r}"
                )
            seen[item.id] = line
            items.append(item)
    return items


def read_row(row: Row, number: int) -> Item:
    """Return a row of lmms-lab's table, which keeps the image's published name beside the image."""
    question = row["question"].split("\n")[0].strip()
    label = row["answer"].strip().lower()
    return _item(row["category"], row["image_source"], image_in_row(number), question, label)


def _item(category: str, name: str, image: str, question: str, label: str) -> Item:
    return Item(_id(category, name, question), category, image, f"{question}\n{SHORT_ANSWER}", label)


def _id(category: str, image: str, question: str) -> str:
    # The published question_id counts from 1 in every category, so it names three questions at once.
    return f"{category}/{image}/{question.strip()}"


def says(prediction: str) -> str:
    """Return "yes" or "no": no if the first sentence has one of the words No, not and no."""
    words = prediction.split(".")[0].replace(",", "").split(" ")
    # POPE's own rule: whatever is not a plain no counts as yes, "NO" and an empty answer as well.
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score(prediction: str, item: Item) -> float:
    """Return 1 if yes or no is right."""
    return float(says(prediction) == item.answer)


def counts(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return accuracy, precision, recall, F1 and yes-ratio, from 0 to 1, with the four counts.

    Where the published scorer divides by zero, the value is None.
    """
    tp = fp = tn = fn = 0
    for one in scored:
        # Between two answers, the score and the label say which one was given.
        if one.item.answer == "yes":
            tp += one.score == 1
            fn += one.score == 0
        else:
            tn += one.score == 1
            fp += one.score == 0
    precision = _share(tp, tp + fp)
    recall = _share(tp, tp + fn)
    f1 = None
    if precision is not None and recall is not None:
        f1 = _share(2 * precision * recall, precision + recall)
    return {
        "items": len(scored),
        "accuracy": _share(tp + tn, len(scored)),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_ratio": _share(tp + fp, len(scored)),
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
    }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return the counts per category and the mean over categories."""
    categories: dict[str, dict[str, Any]] = {}
    for category in CATEGORIES:
        own = [one for one in scored if one.item.source == category]
        if own:
            categories[category] = counts(own)
    mean: dict[str, float | None] = {}
    for name in SHARES:
        values = [category[name] for category in categories.values()]
        # A mean over the categories that happen to have a value would be one of another set of questions.
        mean[name] = None if None in values or not values else sum(values) / len(values)
    return {"categories": categories, "mean": mean}


def tally(scored: Sequence[Scored]) -> Tally:
    """Return TP, FP, TN and FN of each category by image (U, 12); an image is asked about in all three."""
    units = []
    rows = []
    for one in scored:
        row = np.zeros((len(CATEGORIES), 4))
        yes = one.item.answer == "yes"
        right = one.score == 1
        if one.item.source in CATEGORIES:  # a table with a fourth has it in no mean, as in the summary
            row[CATEGORIES.index(one.item.source), (0 if right else 3) if yes else (2 if right else 1)] = 1
        units.append(_picture(one.item))
        rows.append(row.ravel().tolist())
    return tallied(units, rows)


def _picture(item: Item) -> str:
    # By its published name: in lmms-lab's table the three categories have a row, and so a reference, each.
    return item.id.split("/")[1]


def _by_category(counts: np.ndarray) -> np.ndarray:
    return counts.reshape(*counts.shape[:-1], len(CATEGORIES), 4)


def f1(counts: np.ndarray) -> np.ndarray:
    """Return the mean over categories of F1 in percent, of counts (..., 12); NaN where one of them has none."""
    tp, fp, _, fn = np.moveaxis(_by_category(counts), -1, 0)
    # Without a true positive precision and recall are both 0, or not defined.
    values = share(np.where(tp > 0, 2 * tp, np.nan), 2 * tp + fp + fn)
    return 100 * mean_of_groups(values, _by_category(counts).sum(axis=-1) > 0)


def mean_accuracy(counts: np.ndarray) -> np.ndarray:
    """Return the mean over categories of the accuracy in percent, of counts (..., 12)."""
    tp, fp, tn, fn = np.moveaxis(_by_category(counts), -1, 0)
    there = tp + fp + tn + fn
    return 100 * mean_of_groups(share(tp + tn, there), there > 0)


METRICS = (
    Metric("f1", "%", "F1 of yes, mean over the three categories; images are drawn", tally, f1),
    Metric("accuracy", "%", "accuracy, mean over the three categories; images are drawn", tally, mean_accuracy),
)


def item_ids(predictions: list[Prediction], data: Path, where: str) -> list[str]:
    """Return the item of each prediction: LLaVA's ids go through its question file, ours are the items' own."""
    # Ours need no further file, so they are looked at first.
    if all(prediction.id.split("/")[0] in CATEGORIES for prediction in predictions):
        return [prediction.id for prediction in predictions]
    asked = {}
    path = find_file(data, QUESTIONS, "LLaVA's eval.zip, see its docs/Evaluation.md")
    for _, record in read_questions(path):
        question = record["text"].split("\n")[0]  # without the answer format
        asked[str(record["question_id"])] = _id(record["category"], record["image"], question)
    ids = []
    for prediction in predictions:
        if prediction.id not in asked:
            raise TaskError(f"{where}, line {prediction.line}: question_id {prediction.id} is not in {path}")
        ids.append(asked[prediction.id])
    return ids


register_task(
    Benchmark(
        name="pope",
        protocol="llava",
        prompt="question, short answer",
        about="POPE on COCO: object hallucination (accuracy, F1)",
        readers=[PublishedFiles(read_items, images_below("val2014")), ParquetRows("pope", read_row)],
        scorer=Scorer(score, summarise, METRICS),
        source_is="category",
        pairing=Pairing(item_ids),
        notes=(
            "predictions are paired with labels by category, picture and question; LLaVA's scorer pairs them by order",
            "a metric whose denominator is zero is null; LLaVA's scorer stops there",
        ),
    )
)
