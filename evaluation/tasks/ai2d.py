"""AI2D, test: questions about diagrams from school books, multiple choice by letter."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from pathlib import Path

from prunetune.data_recipes.images import FolderImages
from prunetune.evaluation.errors import MissingFile, TaskError
from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_in_row
from prunetune.evaluation.readers import PublishedFiles
from prunetune.evaluation.tasks.base import LETTER, Benchmark, Item, Scorer, register_task
from prunetune.evaluation.tasks.multiple_choice import LETTERS, option_lines

TEST = "ai2d_test_ids.csv"
SOURCE = "https://prior.allenai.org/projects/diagram-understanding (ai2d-all.zip and ai2d_test_ids.csv)"
LABELLED = "abc_images"
"""Holds the diagrams whose texts were replaced by letters, which some questions ask about ("What is A?")."""
_STARTS = re.compile(r"\s*([A-Z])\.")


def read_items(data: Path) -> list[Item]:
    """Return the questions of the test diagrams, diagrams in the order of their numbers."""
    folder = _folder(data)
    # The list is a file of its own, and lies beside what the archive unpacks into as often as in it.
    beside = folder.parent / TEST
    path = beside if beside.is_file() else find_file(data, TEST, SOURCE)
    tested = path.read_text(encoding="utf-8").split()
    items = []
    for number in sorted(tested, key=lambda name: (len(name), name)):
        path = folder / "questions" / f"{number}.png.json"
        if not path.is_file():
            raise TaskError(f"{path} is missing; get it from {SOURCE}")
        record = read_json(path)
        for text, question in record["questions"].items():
            images = LABELLED if question["abcLabel"] else "images"
            name, image = str(question["questionId"]), f"{images}/{record['imageName']}"
            items.append(_item(name, image, text, question["answerTexts"], int(question["correctAnswer"])))
    return items


def read_row(row: Row, number: int) -> Item:
    """Return a row of lmms-lab's table, which carries no id."""
    return _item(f"row {number}", image_in_row(number), row["question"], row["options"], int(row["answer"]))


def _item(name: str, image: str, question: str, options: Sequence[str], right: int) -> Item:
    """Return a question as lmms-eval asks it."""
    prompt = "\n".join([question, *option_lines(options), LETTER])
    return Item(name, "ai2d", image, prompt, LETTERS[right])


def _folder(data: Path) -> Path:
    """Return the folder that the archive unpacks into: it holds questions and images."""
    for path in (data, *sorted(data.rglob("questions"))):
        folder = path.parent if path.name == "questions" else path
        if (folder / "questions").is_dir():
            return folder
    raise MissingFile(f"{data} holds no folder questions; get it from {SOURCE}")


def open_images(data: Path) -> FolderImages:
    """Return the diagrams, as published and with letters in place of their texts."""
    return FolderImages(_folder(data))


def score(prediction: str, item: Item) -> float:
    """Return 1 for the letter alone whatever its case and marks, or for ``X.`` and anything behind it."""
    start = _STARTS.match(prediction)
    said = start.group(1) if start else prediction.translate(str.maketrans("", "", string.punctuation))
    return float(said.lower() == item.answer.lower())


register_task(
    Benchmark(
        name="ai2d",
        protocol="lmms-eval",
        prompt="question, options, letter",
        about="AI2D test: diagrams from school books, multiple choice",
        readers=[PublishedFiles(read_items, open_images), ParquetRows("ai2d", read_row)],
        scorer=Scorer(score),
    )
)
