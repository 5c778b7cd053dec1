"""MM-Vet: open answers that a grader scores; this writes what the grader takes."""

from __future__ import annotations

import json
from pathlib import Path

from prunetune.data_recipes.images import FolderImages
from prunetune.evaluation.files import find_file, read_questions
from prunetune.evaluation.tasks.base import Item, Pair, Task, image_folder, register_task


def read_items(data: Path) -> list[Item]:
    """Return the questions."""
    path = find_file(data, "llava-mm-vet.jsonl", "LLaVA's eval.zip, see its docs/Evaluation.md")
    return [
        Item(str(record["question_id"]), "mmvet", record["image"], record["text"], None)
        for _, record in read_questions(path)
    ]


def upload(pairs: list[Pair], folder: Path) -> Path:
    """Write ``{"v1_ID": answer}`` for the grader."""
    path = folder / "mmvet_upload.json"
    answers = {f"v1_{item.id}": prediction for prediction, item in pairs}
    path.write_text(json.dumps(answers, indent=2, ensure_ascii=False))
    return path


register_task(
    Task(
        name="mmvet",
        protocol="llava",
        prompt="question",
        read=read_items,
        images=lambda data: FolderImages(image_folder(data, "images")),
        score=None,
        upload=upload,
        about="MM-Vet: open answers, graded elsewhere; writes the grader's file",
    )
)
