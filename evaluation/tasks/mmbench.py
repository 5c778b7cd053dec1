"""MMBench in English and Chinese: multiple choice from a table that carries its images."""

from __future__ import annotations

import base64
import csv
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from prunetune.data_recipes.sample import DataError
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import find_file
from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_in_row
from prunetune.evaluation.metrics.metric import Metric, Tally, share, tallied
from prunetune.evaluation.readers import PublishedFiles
from prunetune.evaluation.tasks.base import LETTER, Benchmark, Choose, Item, Scored, Scorer, register_task

ROUND = 1_000_000
"""Circular copies of a question have its index plus a multiple of this."""
LETTERS = "ABCD"
FILES = {"mmbench": "mmbench_dev_20230712.tsv", "mmbench_cn": "mmbench_dev_cn_20231003.tsv"}
SUFFIXES = {"mmbench": LETTER, "mmbench_cn": "请直接回答选项字母。"}
SOURCE = "https://github.com/open-compass/MMBench (the dev split, .tsv)"
# What pandas reads as a missing cell, by which LLaVA and OpenCompass read the table: an option "NA" is none to them.
_MISSING = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip
# OpenCompass takes punctuation for spaces, so that a letter is a word of its own: "(B)", "C.", "D: four".
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST = 4
"""Of how many words at the end one must be the letter."""
REFUSED = "Z"
"""No option's letter: what an answer that refuses to choose stands for."""
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of the table; raises TaskError if it lacks a column."""
    csv.field_size_limit(sys.maxsize)  # an image in base64 is longer than the 128 KiB that csv allows
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    # C, D, hint, category and answer may be missing: not every split and language has them.
    lacking = {"index", "question", "A", "B", "image"} - set(rows[0] if rows else ())
    if lacking:
        raise TaskError(f"{path} lacks the columns {', '.join(sorted(lacking))}")
    return rows


def read_items(name: str, data: Path) -> list[Item]:
    """Return the questions with hint and options as LLaVA asks them; the source is the category."""
    rows = read_rows(find_file(data, FILES[name], SOURCE))
    return [item_of(row, SUFFIXES[name]) for row in rows]


def read_row(name: str, row: Row, number: int) -> Item:
    """Return a row of lmms-lab's table, which has the columns of the published one."""
    cells = {column: value for column, value in row.items() if column != "image"}
    return replace(item_of(cells, SUFFIXES[name]), image=image_in_row(number))


def item_of(row: dict[str, Any], suffix: str) -> Item:
    """Return one row of the table as an item."""
    cells = {}
    for name, value in row.items():
        if not _missing(value):
            cells[name] = str(value)
    lines = []
    if "hint" in cells:
        lines.append(cells["hint"])
    lines.append(cells["question"])
    options = {}
    for letter in LETTERS:
        if letter not in cells:  # LLaVA reads the options up to the first that is missing
            break
        options[letter] = cells[letter]
        lines.append(f"{letter}. {cells[letter]}")
    # The test split has no answers: it is asked all the same, for the upload.
    answer = {"letter": cells["answer"], "options": options} if "answer" in cells else None
    question = "\n".join([*lines, suffix])
    # MMBench's twenty abilities are the categories; they are grouped into six, which the two layouts name differently.
    group = cells.get("l2-category", cells.get("L2-category"))
    kinds = {"group": group} if group else {}
    return Item(cells["index"], cells.get("category", ""), f"index:{cells['index']}", question, answer, kinds)


def stem(item: Item) -> str:
    """Return hint and question without the options."""
    return item.question.rsplit("\nA. ", 1)[0]


def _missing(value: Any) -> bool:
    """Return whether LLaVA takes a cell for missing, which "None", in whatever case, is to it as well."""
    if value is None or value != value:  # a table that went through pandas holds NaN, which no number equals
        return True
    return str(value) in _MISSING or str(value).lower() in ("nan", "none")


def chosen(prediction: str, options: Mapping[str, str]) -> str:
    """Return the letter that an answer chooses by OpenCompass's rules, :data:`REFUSED`, or nothing if they see none.

    The only letter that is a word of its own, if it stands among the last four words; else that of the only option
    whose text the answer holds, if the answer is not longer than all options twice. ``"The answer is C."`` chooses C,
    ``"A B"`` nothing.
    """
    if any(refusal in prediction for refusal in _REFUSALS):
        return REFUSED
    words = prediction.translate(_PUNCTUATION).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - _LAST:
        return letters[0]
    if not letters and REFUSED in words:
        return REFUSED
    if len(prediction) > 2 * sum(len(option) for option in options.values()):
        return ""
    held = [letter for letter, option in options.items() if option.lower() in prediction.lower()]
    # "dark blue" holds "blue" too: of two options that fit, neither was chosen clearly.
    return held[0] if len(held) == 1 else ""


def judged(scored: Sequence[Scored], choose: Choose) -> list[Scored]:
    """Return the answers with what a judge makes of those that the rules see no choice in."""
    found = []
    for one in scored:
        answer = one.item.answer
        if answer is not None and not chosen(one.prediction, answer["options"]):
            letter = choose(stem(one.item), answer["options"], one.prediction)
            one = replace(one, score=float(letter == answer["letter"]))
        found.append(one)
    return found


def score(prediction: str, item: Item) -> float:
    """Return 1 for the right letter; 0 where the answer is hidden."""
    if item.answer is None:
        return 0.0
    return float(chosen(prediction, item.answer["options"]) == item.answer["letter"])


def summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return accuracy in percent: a question counts when all its circular copies are right.

    ``single_round`` is that of the questions as they are asked first, with none of their options turned.
    """
    groups = grouped(scored)
    # Circular evaluation asks each question with its options turned; who guesses is right once, not every time.
    right = sum(all(scores) for scores in groups.values())
    circular = any(len(scores) > 1 for scores in groups.values())
    first = [one.score or 0 for one in scored if int(one.item.id) < ROUND]
    return {
        "accuracy": 100 * right / len(groups),
        "single_round": 100 * sum(first) / len(first) if first else None,
        "questions": len(groups),
        "evaluation": "circular" if circular else "single round",
    }


def grouped(scored: Sequence[Scored]) -> dict[int, list[float]]:
    """Return the scores of each question and of its circular copies."""
    groups: dict[int, list[float]] = {}
    for one in scored:
        groups.setdefault(int(one.item.id) % ROUND, []).append(one.score or 0)
    return groups


def tally(scored: Sequence[Scored]) -> Tally:
    """Return by circular group whether all is right, 1, the first round's right answers and its questions (U, 4)."""
    rows = {}
    for number, scores in grouped(scored).items():
        rows[number] = [float(all(scores)), 1.0, 0.0, 0.0]
    for one in scored:
        if int(one.item.id) < ROUND:
            row = rows[int(one.item.id)]
            row[2] += one.score or 0
            row[3] += 1
    return tallied(list(rows), list(rows.values()))


NOTES = (
    "letters are read by OpenCompass's rules; an answer in which they see no option is wrong unless a grader is asked, "
    "where OpenCompass asks GPT",
)
METRICS = (
    Metric(
        name="accuracy",
        unit="%",
        about="questions right in every circular copy that the table has; questions are drawn with their copies",
        tally=tally,
        value=lambda counts: 100 * share(counts[..., 0], counts[..., 1]),
    ),
    Metric(
        name="single_round",
        unit="%",
        about="questions right as they are asked first; questions are drawn",
        tally=tally,
        value=lambda counts: 100 * share(counts[..., 2], counts[..., 3]),
    ),
)


def upload(name: str, scored: Sequence[Scored], folder: Path) -> Path:
    """Write the sheet that MMBench's server takes: the questions with a column of predictions."""
    from openpyxl import Workbook  # slow to import, and only an upload needs it

    book = Workbook()
    sheet = book.active
    assert sheet is not None  # a new book has one
    sheet.append(["index", "question", *LETTERS, "prediction"])
    for one in scored:
        options = (one.item.answer or {}).get("options", {})
        cells = [options.get(letter, "") for letter in LETTERS]
        sheet.append([int(one.item.id), stem(one.item), *cells, one.prediction])
    path = folder / f"{FILES[name].removesuffix('.tsv')}_upload.xlsx"
    book.save(path)
    return path


class TableImages:
    """Images in the table itself, base64 or the index of the row that has it; a reference is ``index:INDEX``."""

    def __init__(self, path: Path) -> None:
        self._images = {row["index"]: row["image"] for row in read_rows(path)}

    def exists(self, reference: str) -> bool:
        """Return whether the row is there."""
        return reference.removeprefix("index:") in self._images

    def open(self, reference: str, sample_id: str) -> Image.Image:
        """Return the decoded RGB image."""
        data = self._images[reference.removeprefix("index:")]
        data = self._images.get(data, data)  # circular copies name the row that holds the image
        try:
            with Image.open(io.BytesIO(base64.b64decode(data))) as image:
                return image.convert("RGB")
        except (OSError, ValueError) as error:
            raise DataError(f"sample {sample_id!r}: its picture can't be decoded ({error})") from error


def open_images(name: str, data: Path) -> TableImages:
    """Return the images of the table."""
    return TableImages(find_file(data, FILES[name], SOURCE))


for _name, _language in (("mmbench", "English"), ("mmbench_cn", "Chinese")):
    register_task(
        Benchmark(
            name=_name,
            protocol="opencompass",
            prompt="hint, question, options, letter",
            about=f"MMBench dev, {_language}: multiple choice, circular where the table allows; writes the sheet",
            readers=[
                PublishedFiles(partial(read_items, _name), partial(open_images, _name)),
                ParquetRows(_name, partial(read_row, _name)),
            ],
            scorer=Scorer(score, summarise, METRICS, NOTES, judged),
            source_is="category",
            upload=partial(upload, _name),
        )
    )
