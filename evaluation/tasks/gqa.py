"""GQA, balanced test-dev: exact match, and the binary and open halves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_named
from prunetune.evaluation.readers import PublishedFiles, images_below
from prunetune.evaluation.tasks.base import SHORT_ANSWER, Benchmark, Item, Scored, Scorer, averaged, register_task

QUESTIONS = "testdev_balanced_questions.json"
SOURCE = "https://cs.stanford.edu/people/dorarad/gqa/download.html (questions1.2.zip)"


def read_items(data: Path) -> list[Item]:
    """Return the balanced questions in the file's order."""
    items = []
    for number, record in read_json(find_file(data, QUESTIONS, SOURCE)).items():
        # The file of all questions has the same format; LLaVA reports the balanced ones.
        if record.get("isBalanced", True):
            items.append(_item(number, record, "{}.jpg"))
    return items


def read_row(row: Row, number: int) -> Item:
    """Return a row of lmms-lab's table; its images are in files of their own."""
    return _item(str(row["id"]), row, image_named("{}"))


def _item(number: str, record: dict[str, Any], image: str) -> Item:
    """Return a question; its source says whether it is binary or open, and ``image`` has a gap for the image's id."""
    # Only a "query" asks for a word; verify, logical, choose and compare name their answers in the question.
    kind = "open" if record["types"]["structural"] == "query" else "binary"
    question = f"{record['question']}\n{SHORT_ANSWER}"
    kinds = {"structural": record["types"]["structural"]}
    if record["types"].get("semantic"):
        kinds["semantic"] = record["types"]["semantic"]
    return Item(number, kind, image.format(record["imageId"]), question, record["answer"], kinds)


def clean(prediction: str) -> str:
    """Return a prediction as LLaVA hands it to GQA's scorer."""
    # Nothing more: "a dog" for "dog" is wrong, in LLaVA's numbers as in these.
    return prediction.rstrip(".").lower()


def score(prediction: str, item: Item) -> float:
    """Return 1 for the exact answer."""
    return float(clean(prediction) == item.answer)


def summarise(scored: Sequence[Scored]) -> dict[str, float | None]:
    """Return accuracy in percent, of all, binary and open questions."""
    mean = averaged(scored)
    return {
        "accuracy": mean.overall,
        "binary": mean.by_source.get("binary"),
        "open": mean.by_source.get("open"),
    }


register_task(
    Benchmark(
        name="gqa",
        protocol="llava",
        prompt="question, short answer",
        about="GQA test-dev balanced: compositional questions (exact match)",
        readers=[PublishedFiles(read_items, images_below("images")), ParquetRows("gqa", read_row)],
        scorer=Scorer(score, summarise),
        source_is="form",
    )
)
