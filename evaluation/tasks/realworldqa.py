"""RealWorldQA: questions about photographs, many of them taken from cars; options or a short answer."""

from __future__ import annotations

from pathlib import Path

from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_in_row
from prunetune.evaluation.metrics.letters import ranked_letter
from prunetune.evaluation.readers import PublishedFiles, images_below
from prunetune.evaluation.tasks.base import Benchmark, Item, Scorer, register_task

SOURCE = "https://x.ai/news/grok-1.5v (realworldqa.zip), or https://huggingface.co/datasets/xai-org/RealworldQA"
LETTERS = "ABCD"


def read_items(data: Path) -> list[Item]:
    """Return the questions of the published archive, which have no ids: their numbers in the file."""
    items = []
    for number, record in enumerate(read_json(find_file(data, "annotations.json", SOURCE))):
        items.append(_item(number, record["image"], record["question"], record["answer"]))
    return items


def read_row(row: Row, number: int) -> Item:
    """Return a row of the table, which is in the archive's order."""
    return _item(number, image_in_row(number), row["question"], row["answer"])


def _item(number: int, image: str, question: str, answer: str) -> Item:
    """Return a question, which says itself how it is to be answered; the source is its kind."""
    answer = answer.strip()
    kind = "choice" if answer.upper() in tuple(LETTERS) else "open"
    return Item(str(number), kind, image, question.strip(), answer)


def score(prediction: str, item: Item) -> float:
    """Return 1 for the right letter, or for the same short answer whatever its case and full stop."""
    if item.source == "choice":
        return float(ranked_letter(prediction, LETTERS) == item.answer.upper())
    return float(prediction.lower().strip().rstrip(".") == item.answer.lower())


register_task(
    Benchmark(
        name="realworldqa",
        protocol="lmms-eval",
        prompt="question",
        about="RealWorldQA: photographs, multiple choice and short answers",
        readers=[PublishedFiles(read_items, images_below("images")), ParquetRows("realworldqa", read_row)],
        scorer=Scorer(score),
    )
)
