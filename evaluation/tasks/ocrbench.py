"""OCRBench: reading text in pictures; an answer counts when the prediction holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunetune.data_recipes.images import FolderImages
from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.tasks.base import Item, Pair, Task, image_folder, register_task

SOURCE = "https://github.com/Yuliang-Liu/MultimodalOCR (OCRBench/OCRBench.json and its pictures)"
FORMULAS = "HME100k"


def read_items(data: Path) -> list[Item]:
    """Return the questions; the source is the kind of task, and formulas are marked in the answer."""
    items = []
    for number, record in enumerate(read_json(find_file(data, "OCRBench.json", SOURCE))):
        answers = record["answers"] if isinstance(record["answers"], list) else [record["answers"]]
        answer = {"any": [str(a) for a in answers], "formula": record["dataset_name"] == FORMULAS}
        name = str(record.get("id", number))
        items.append(Item(name, record["type"], record["image_path"], record["question"], answer))
    return items


def score(prediction: str, item: Item) -> float:
    """Return 1 if the prediction holds one of the answers: of formulas without spaces, else whatever the case."""
    if item.answer["formula"]:
        said = _line(prediction).replace(" ", "")
        return float(any(_line(answer).replace(" ", "") in said for answer in item.answer["any"]))
    said = _line(prediction).lower()
    return float(any(_line(answer).lower() in said for answer in item.answer["any"]))


def _line(text: str) -> str:
    return text.strip().replace("\n", " ")


def metrics(pairs: list[Pair]) -> dict[str, Any]:
    """Return the number of right answers (of 1,000 in the published set), in all and by kind."""
    kinds = {item.source: 0 for _, item in pairs}
    for prediction, item in pairs:
        kinds[item.source] += int(score(prediction, item))
    return {"score": sum(kinds.values()), "of": len(pairs), "by_kind": kinds}


register_task(
    Task(
        name="ocrbench",
        protocol="lmms-eval",
        prompt="question",
        read=read_items,
        images=lambda data: FolderImages(image_folder(data, "OCRBench_Images")),
        score=score,
        metrics=metrics,
        about="OCRBench: reading text in pictures (answers found, of 1,000)",
    )
)
