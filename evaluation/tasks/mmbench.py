"""MMBench in English and Chinese: multiple choice from a table that carries its pictures."""

from __future__ import annotations

import base64
import csv
import io
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from prunetune.data_recipes.sample import DataError
from prunetune.evaluation.files import find_file
from prunetune.evaluation.tasks.base import LETTER, Item, Pair, Task, TaskError, register_task

ROUND = 1_000_000
"""Circular copies of a question have its index plus a multiple of this."""
LETTERS = "ABCD"
FILES = {"mmbench": "mmbench_dev_20230712.tsv", "mmbench_cn": "mmbench_dev_cn_20231003.tsv"}
SOURCE = "https://github.com/open-compass/MMBench (the dev split, .tsv)"
_LETTER = re.compile(r"^\(?([A-D])(?![A-Za-z])")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of the table; raises TaskError if it lacks a column."""
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    lacking = {"index", "question", "A", "B", "image"} - set(rows[0] if rows else ())
    if lacking:
        raise TaskError(f"{path} lacks the columns {', '.join(sorted(lacking))}")
    return rows


def read_items(file: str, suffix: str, data: Path) -> list[Item]:
    """Return the questions with hint and options as LLaVA asks them; the source is the category."""
    return [item_of(row, suffix) for row in read_rows(find_file(data, file, SOURCE))]


def item_of(row: dict[str, Any], suffix: str) -> Item:
    """Return one row of the table as an item."""
    cells = {name: str(value) for name, value in row.items() if value not in (None, "") and str(value).lower() != "nan"}
    hint = f"{cells['hint']}\n" if "hint" in cells else ""
    options = {letter: cells[letter] for letter in LETTERS if letter in cells}
    lines = "".join(f"\n{letter}. {text}" for letter, text in options.items())
    answer = {"letter": cells["answer"], "options": options} if "answer" in cells else None
    question = f"{hint}{cells['question']}{lines}\n{suffix}"
    return Item(cells["index"], cells.get("category", ""), f"index:{cells['index']}", question, answer)


def chosen(prediction: str, options: dict[str, str]) -> str:
    """Return the chosen letter: one at the start, or of the only option whose text the prediction holds; or nothing."""
    text = prediction.strip()
    start = _LETTER.match(text)
    if start and start.group(1) in options:
        return start.group(1)
    held = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return held[0] if len(held) == 1 else ""


def score(prediction: str, item: Item) -> float:
    """Return 1 for the right letter; 0 where the answer is hidden."""
    return float(item.answer is not None and chosen(prediction, item.answer["options"]) == item.answer["letter"])


def metrics(pairs: list[Pair]) -> dict[str, Any]:
    """Return accuracy in percent: a question counts when all its circular copies are right."""
    groups: dict[int, list[float]] = {}
    for prediction, item in pairs:
        groups.setdefault(int(item.id) % ROUND, []).append(score(prediction, item))
    right = sum(all(values) for values in groups.values())
    rounds = "circular" if any(len(values) > 1 for values in groups.values()) else "single round"
    return {"accuracy": 100 * right / len(groups), "questions": len(groups), "evaluation": rounds}


def upload(file: str, pairs: list[Pair], folder: Path) -> Path:
    """Write the sheet that MMBench's server takes: the questions with a column of predictions."""
    from openpyxl import Workbook

    book = Workbook()
    sheet = book.active
    assert sheet is not None  # a new book has one
    sheet.append(["index", "question", *LETTERS, "prediction"])
    for prediction, item in pairs:
        options = (item.answer or {}).get("options", {})
        question = item.question.rsplit("\nA. ", 1)[0]
        sheet.append([int(item.id), question, *(options.get(letter, "") for letter in LETTERS), prediction])
    path = folder / f"{file.removesuffix('.tsv')}_upload.xlsx"
    book.save(path)
    return path


class TableImages:
    """Pictures in the table itself, base64 or the index of the row that has it; a reference is ``index:INDEX``."""

    def __init__(self, path: Path) -> None:
        self._images = {row["index"]: row["image"] for row in read_rows(path)}

    def exists(self, reference: str) -> bool:
        """Return whether the row is there."""
        return reference.removeprefix("index:") in self._images

    def open(self, reference: str, sample_id: str) -> Image.Image:
        """Return the decoded RGB picture."""
        data = self._images[reference.removeprefix("index:")]
        data = self._images.get(data, data)  # circular copies name the row that holds the picture
        try:
            with Image.open(io.BytesIO(base64.b64decode(data))) as image:
                return image.convert("RGB")
        except (OSError, ValueError) as error:
            raise DataError(f"sample {sample_id!r}: its picture can't be decoded ({error})") from error


def open_images(file: str, data: Path) -> TableImages:
    """Return the pictures of the table."""
    return TableImages(find_file(data, file, SOURCE))


SUFFIXES = {"mmbench": LETTER, "mmbench_cn": "请直接回答选项字母。"}
for _name, _language in (("mmbench", "English"), ("mmbench_cn", "Chinese")):
    register_task(
        Task(
            name=_name,
            protocol="llava",
            prompt="hint, question, options, letter",
            read=partial(read_items, FILES[_name], SUFFIXES[_name]),
            images=partial(open_images, FILES[_name]),
            score=score,
            metrics=metrics,
            upload=partial(upload, FILES[_name]),
            about=f"MMBench dev, {_language}: multiple choice, circular where the table allows; writes the sheet",
        )
    )
