"""VizWiz: questions of blind people about photographs of theirs; validation, and the test set with hidden answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_in_row
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
from prunetune.evaluation.tasks.vqa import METRICS, UNANSWERABLE, hidden_items, people, score, summarise, write_answers

QUESTIONS = "val.json"
TEST = "llava_test.jsonl"
SOURCE = "https://vizwiz.org/tasks-and-datasets/vqa/"


def read_items(data: Path) -> list[Item]:
    """Return the validation questions; an item's id is its image's name, since there is one question per image."""
    # The answer's type is the source: unanswerable questions are where pruning and guessing look alike.
    items = []
    for record in read_json(find_file(data, QUESTIONS, SOURCE)):
        kind = str(record.get("answer_type", "other"))
        image = record["image"]
        items.append(Item(image, kind, image, _asked(record["question"]), people(record)))
    return items


def read_test(data: Path) -> list[Item]:
    """Return the questions of the test set as LLaVA asks them."""
    return hidden_items(data, TEST)


def read_row(row: Row, number: int) -> Item:
    """Return a row of lmms-lab's table, which calls the answer's type a category."""
    kind = str(row.get("category") or "other")
    name = _with_extension(str(row["question_id"]))
    return Item(name, kind, image_in_row(number), _asked(row["question"]), people(row))


def _asked(question: str) -> str:
    return f"{question}\n{UNANSWERABLE}\n{SHORT_ANSWER}"


def item_ids(predictions: list[Prediction], data: Path, where: str) -> list[str]:
    """Return the image's name of each prediction."""
    return [_with_extension(prediction.id) for prediction in predictions]


def _with_extension(name: str) -> str:
    # LLaVA's ids may lack it, and so may lmms-lab's; all images are JPEG files.
    return name if "." in name else f"{name}.jpg"


def upload(scored: Sequence[Scored], folder: Path) -> Path:
    """Write the file that VizWiz's server takes."""
    return write_answers(folder / "vizwiz_upload.json", scored, "image")


register_task(
    Benchmark(
        name="vizwiz",
        protocol="llava",
        prompt="question, unanswerable hint, short answer",
        about="VizWiz validation: blind people's questions (VQA accuracy)",
        readers=[PublishedFiles(read_items, images_below("val")), ParquetRows("vizwiz", read_row)],
        scorer=Scorer(score, summarise, METRICS),
        source_is="answer type",
        pairing=Pairing(item_ids),
    )
)
register_task(
    Benchmark(
        name="vizwiz_test",
        protocol="llava",
        prompt="question, unanswerable hint, short answer",
        about="VizWiz test: answers are hidden, writes the upload file",
        readers=[PublishedFiles(read_test, images_below("test"))],
        scorer=None,
        upload=upload,
    )
)
