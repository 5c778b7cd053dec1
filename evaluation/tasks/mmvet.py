"""MM-Vet: open answers that a grader scores; this writes what the grader takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from prunetune.evaluation.files import find_file, read_questions
from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_in_row
from prunetune.evaluation.readers import PublishedFiles, images_below
from prunetune.evaluation.tasks.base import Benchmark, Item, Scored, register_task
from prunetune.outputs import write_text

QUESTIONS = "llava-mm-vet.jsonl"
SOURCE = "LLaVA's eval.zip, see its docs/Evaluation.md"


def read_items(data: Path) -> list[Item]:
    """Return the questions."""
    items = []
    for _, record in read_questions(find_file(data, QUESTIONS, SOURCE)):
        items.append(Item(str(record["question_id"]), "mmvet", record["image"], record["text"], None))
    return items


def read_row(row: Row, number: int) -> Item:
    """Return a row of lmms-lab's table."""
    name = str(row["question_id"]).removeprefix("v1_")  # LLaVA's ids lack it, and the upload puts it back
    return Item(name, "mmvet", image_in_row(number), row["question"], None)


def upload(scored: Sequence[Scored], folder: Path) -> Path:
    """Write ``{"v1_ID": answer}`` for the grader."""
    answers = {}
    for one in scored:
        answers[f"v1_{one.item.id}"] = one.prediction
    path = folder / "mmvet_upload.json"
    write_text(path, json.dumps(answers, indent=2, ensure_ascii=False))
    return path


register_task(
    Benchmark(
        name="mmvet",
        protocol="llava",
        prompt="question",
        about="MM-Vet: open answers, graded elsewhere; writes the grader's file",
        readers=[PublishedFiles(read_items, images_below("images")), ParquetRows("mmvet", read_row)],
        # The answers are published, but only a language model can compare open answers with them.
        scorer=None,
        upload=upload,
    )
)
