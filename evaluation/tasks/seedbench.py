"""SEED-Bench, the questions about images: nine dimensions, multiple choice by letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_in_row
from prunetune.evaluation.readers import PublishedFiles, images_below
from prunetune.evaluation.tasks.base import LETTER, Benchmark, Item, Scored, Scorer, averaged, register_task
from prunetune.evaluation.tasks.multiple_choice import option_lines

FILE = "SEED-Bench.json"
SOURCE = "https://huggingface.co/datasets/AILab-CVC/SEED-Bench (and SEED-Bench-image.zip)"
IMAGES = images_below("SEED-Bench-image")
# As the benchmark's DATASET.md has them; the Parquet table carries their numbers alone. 10 to 12 are about videos.
DIMENSIONS = {
    1: "Scene Understanding",
    2: "Instance Identity",
    3: "Instance Location",
    4: "Instance Attributes",
    5: "Instances Counting",
    6: "Spatial Relation",
    7: "Instance Interaction",
    8: "Visual Reasoning",
    9: "Text Understanding",
}


def read_items(data: Path) -> list[Item]:
    """Return the questions about images in the file's order; the source is the dimension."""
    file = read_json(find_file(data, FILE, SOURCE))
    names = {int(number): name for name, number in file["question_type"].items()}
    items = []
    for record in file["questions"]:
        if record["data_type"] == "image":
            items.append(_item(record, str(record["data_id"]), names))
    return items


def read_row(row: Row, number: int) -> Item | None:
    """Return a row of lmms-lab's table, which holds the questions about videos as well; None for those."""
    return _item(row, image_in_row(number), DIMENSIONS) if row["data_type"] == "image" else None


def _item(record: Mapping[str, Any], image: str, names: Mapping[int, str]) -> Item:
    """Return a question as LLaVA's question file has it, which is lmms-eval's prompt as well."""
    kind = int(record["question_type_id"])
    if kind not in names:
        raise TaskError(
            f"question {record['question_id']}: there is no dimension {kind} of images; is it the first one?"
        )
    options = [record[f"choice_{letter}"] for letter in "abcd"]
    question = "\n".join([record["question"], *option_lines(options), LETTER])
    return Item(str(record["question_id"]), names[kind], image, question, record["answer"])


def score(prediction: str, item: Item) -> float:
    """Return 1 for the right letter and nothing beside it, as LLaVA's script compares them."""
    return float(prediction == item.answer)


def summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return accuracy in percent over all questions about images, and by dimension."""
    mean = averaged(scored)
    return {"accuracy": mean.overall, "by_dimension": mean.by_source}


register_task(
    Benchmark(
        name="seedbench",
        protocol="llava",
        prompt="question, options, letter",
        about="SEED-Bench, image part: nine dimensions, multiple choice",
        readers=[PublishedFiles(read_items, IMAGES), ParquetRows("seedbench", read_row)],
        scorer=Scorer(score, summarise),
        notes=("the letter alone is right, as in LLaVA's script; lmms-eval takes an answer's first character",),
    )
)
