"""MMStar: 1,500 questions that can't be answered without their image, multiple choice by letter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_in_row
from prunetune.evaluation.metrics.letters import ranked_letter
from prunetune.evaluation.tasks.base import ACCURACY, Benchmark, Item, Scored, Scorer, averaged, register_task
from prunetune.evaluation.tasks.multiple_choice import mean_over_groups

SOURCE = "https://huggingface.co/datasets/Lin-Chen/MMStar (mmstar.parquet)"
# lmms-eval's sentence, which has no full stop, and the one that it takes out of questions.
ENDING = "\nAnswer with the option's letter from the given choices directly"
LEFT_OUT = " Please answer yes or no."
# Six capabilities with 250 questions each.
CATEGORIES = (
    "coarse perception",
    "fine-grained perception",
    "instance reasoning",
    "logical reasoning",
    "science & technology",
    "math",
)


def read_row(row: Row, number: int) -> Item:
    """Return a row of the published table, whose questions hold their options; the source is the capability."""
    if row["category"] not in CATEGORIES:
        raise TaskError(f"question {row['index']}: {row['category']!r} is none of {', '.join(CATEGORIES)}")
    question = row["question"].strip().replace(LEFT_OUT, "") + ENDING
    answer = {"letter": row["answer"].strip().upper(), "detail": row["l2_category"]}
    return Item(str(row["index"]), row["category"], image_in_row(number), question, answer)


def score(prediction: str, item: Item) -> float:
    """Return 1 for the right letter."""
    return float(ranked_letter(prediction, "ABCD") == item.answer["letter"])


def _details(scored: Sequence[Scored]) -> dict[str, list[float]]:
    """Return the scores by detailed kind, of which there are 18."""
    kinds: dict[str, list[float]] = {}
    for one in scored:
        kinds.setdefault(one.item.answer["detail"], []).append(one.score or 0.0)
    return kinds


def summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return accuracy in percent, its mean over capabilities (the paper's) and over detailed kinds (lmms-eval's)."""
    mean = averaged(scored)
    details = [sum(scores) / len(scores) for scores in _details(scored).values()]
    return {
        "accuracy": mean.overall,
        "average": AVERAGE.of(scored),
        "detail_average": 100 * sum(details) / len(details),
        "by_capability": mean.by_source,
    }


AVERAGE = mean_over_groups(
    "average",
    CATEGORIES,
    lambda one: one.item.source,
    "mean of the six capabilities' accuracies; images are drawn",
)


register_task(
    Benchmark(
        name="mmstar",
        protocol="lmms-eval",
        prompt="question, options, letter",
        about="MMStar: six capabilities, multiple choice (mean of their accuracies)",
        readers=[ParquetRows("mmstar", read_row, source=SOURCE)],
        scorer=Scorer(score, summarise, metrics=(AVERAGE, ACCURACY)),
        notes=("average is that of the paper's table, over capabilities; lmms-eval's is detail_average",),
    )
)
