"""The lmms-lab layout: benchmarks as Parquet files with their pictures in a column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from prunetune.data_recipes.parquet import NAMED, ROW, ParquetImages, parquet_rows
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.tasks import captions, mmbench
from prunetune.evaluation.tasks.base import LETTER, SHORT_ANSWER, Item
from prunetune.evaluation.tasks.mme import plain
from prunetune.evaluation.tasks.vqa import UNANSWERABLE

Row = dict[str, Any]


def _answers(row: Row) -> list[str]:
    return [answer["answer"] if isinstance(answer, dict) else str(answer) for answer in row["answers"]]


def _gqa(row: Row, number: int) -> Item:
    kind = "open" if row["types"]["structural"] == "query" else "binary"
    return Item(str(row["id"]), kind, f"{NAMED}{row['imageId']}", f"{row['question']}\n{SHORT_ANSWER}", row["answer"])


def _textvqa(row: Row, number: int, ocr: bool) -> Item:
    tokens = f"Reference OCR token: {', '.join(row['ocr_tokens'])}\n" if ocr else ""
    name = f"{row['image_id']}/{row['question'].lower()}"
    question = f"{row['question'].capitalize()}\n{tokens}{SHORT_ANSWER}"
    return Item(name, "textvqa", f"{ROW}{number}", question, _answers(row))


def _vqa(row: Row, number: int) -> Item:
    kind = str(row.get("answer_type") or "other")
    return Item(str(row["question_id"]), kind, f"{ROW}{number}", f"{row['question']}\n{SHORT_ANSWER}", _answers(row))


def _vizwiz(row: Row, number: int) -> Item:
    name = str(row["question_id"])
    question = f"{row['question']}\n{UNANSWERABLE}\n{SHORT_ANSWER}"
    return Item(
        name if "." in name else f"{name}.jpg", str(row.get("category") or "other"), f"{ROW}{number}", question,
        _answers(row),
    )  # fmt: skip


def _pope(row: Row, number: int) -> Item:
    question = row["question"].split("\n")[0].strip()
    name = f"{row['category']}/{row['image_source']}/{question}"
    return Item(name, row["category"], f"{ROW}{number}", f"{question}\n{SHORT_ANSWER}", row["answer"].strip().lower())


def _mme(row: Row, number: int) -> Item:
    stem = str(row["question_id"]).split("/")[-1].rsplit(".", 1)[0]
    question = plain(row["question"])
    name = f"{row['category']}/{stem}/{question}"
    answer = row["answer"].strip().lower()
    return Item(name, row["category"], f"{ROW}{number}", f"{question}\n{SHORT_ANSWER}", answer)


def _scienceqa(row: Row, number: int) -> Item:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCDE", row["choices"], strict=False))
    context = f"Context: {row['hint']}\n" if row.get("hint") else ""
    image = f"{ROW}{number}" if row.get("image") else None
    answer = {"index": row["answer"], "choices": len(row["choices"])}
    question = f"{context}{row['question']}\n{choices}\n{LETTER}"
    return Item(f"row {number}", "text" if image is None else "image", image, question, answer)


def _chartqa(row: Row, number: int) -> Item:
    kind = "human" if "human" in row["type"] else "augmented"
    answer = row["answer"][0] if isinstance(row["answer"], list) else row["answer"]
    question = f"{row['question']}\nAnswer the question with a single word."
    return Item(f"{kind}/{number}", kind, f"{ROW}{number}", question, str(answer))


def _ocrbench(row: Row, number: int) -> Item:
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    answer = {"any": [str(a) for a in answers], "formula": row["dataset"] == "HME100k"}
    return Item(str(number), row["question_type"], f"{ROW}{number}", row["question"], answer)


def _mmbench(suffix: str, row: Row, number: int) -> Item:
    cells = {name: value for name, value in row.items() if name != "image"}
    return replace(mmbench.item_of(cells, suffix), image=f"{ROW}{number}")


def _mmvet(row: Row, number: int) -> Item:
    name = str(row["question_id"]).removeprefix("v1_")
    return Item(name, "mmvet", f"{ROW}{number}", row["question"], None)


def _coco_caption(row: Row, number: int) -> Item:
    return Item(str(row["id"]), "coco", f"{ROW}{number}", captions.PROMPT, list(row["answer"]))


def _nocaps(row: Row, number: int) -> Item:
    domain = str(row.get("image_domain") or "nocaps")
    return Item(str(row["image_id"]), domain, f"{ROW}{number}", captions.PROMPT, list(row["annotations_captions"]))


ROWS: dict[str, Callable[[Row, int], Item]] = {
    "chartqa": _chartqa,
    "coco_caption": _coco_caption,
    "mmbench": partial(_mmbench, mmbench.SUFFIXES["mmbench"]),
    "mmbench_cn": partial(_mmbench, mmbench.SUFFIXES["mmbench_cn"]),
    "mmvet": _mmvet,
    "nocaps": _nocaps,
    "gqa": _gqa,
    "mme": _mme,
    "ocrbench": _ocrbench,
    "okvqa": _vqa,
    "pope": _pope,
    "scienceqa": _scienceqa,
    "textvqa": lambda row, number: _textvqa(row, number, ocr=True),
    "textvqa_no_ocr": lambda row, number: _textvqa(row, number, ocr=False),
    "vizwiz": _vizwiz,
    "vqav2": _vqa,
}


def is_lmms_lab(name: str, data: Path) -> bool:
    """Return whether a task's folder holds Parquet files that it can be read from."""
    return name in ROWS and any(data.rglob("*.parquet"))


def read_items(name: str, data: Path) -> list[Item]:
    """Return a task's items in the order of the files.

    Raises:
        TaskError: if a column is missing, or items repeat.
    """
    rows = _questions(data)
    try:
        items = [ROWS[name](row, number) for number, row in enumerate(rows)]
    except KeyError as error:
        there = ", ".join(rows.column_names)
        raise TaskError(f"{data}: the Parquet files of {name} have no column {error}; they have {there}") from None
    if name.startswith("textvqa"):  # the same question may be asked twice of a picture
        seen: Counter[str] = Counter()
        for place, item in enumerate(items):
            seen[item.id] += 1
            if seen[item.id] > 1:
                items[place] = replace(item, id=f"{item.id}#{seen[item.id]}")
    if len({item.id for item in items}) < len(items):
        raise TaskError(f"{data}: questions of {name} repeat; keep the files of one split only")
    return items


def open_images(data: Path) -> ParquetImages:
    """Return the pictures: of the question's own rows, or, where those have none, of the files that do."""
    rows = _questions(data)
    return ParquetImages(rows if "image" in rows.column_names else _tables(data)[1])


def _questions(data: Path) -> Any:
    return _tables(data)[0]


def _tables(data: Path) -> tuple[Any, Any]:
    """Return the rows with questions and the rows with nothing but pictures."""
    questions: list[Path] = []
    pictures: list[Path] = []
    for path in sorted(data.rglob("*.parquet")):
        columns = parquet_rows(path).column_names
        (questions if set(columns) - {"id", "image"} else pictures).append(path)
    if not questions:
        raise TaskError(f"{data}: the Parquet files hold pictures only, and no questions")
    return parquet_rows(questions), parquet_rows(pictures) if pictures else None
