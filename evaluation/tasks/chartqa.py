"""ChartQA, test: human and augmented questions, relaxed accuracy."""

from __future__ import annotations

from pathlib import Path

from prunetune.data_recipes.images import FolderImages
from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.tasks.base import Item, Pair, Task, image_folder, percent, register_task

SOURCE = "https://github.com/vis-nlp/ChartQA (ChartQA Dataset/test)"
TOLERANCE = 0.05


def read_items(data: Path) -> list[Item]:
    """Return human questions, then augmented ones; ids are ``KIND/NUMBER``."""
    items = []
    for kind in ("human", "augmented"):
        for number, record in enumerate(read_json(find_file(data, f"test_{kind}.json", SOURCE))):
            question = f"{record['query']}\nAnswer the question with a single word."
            items.append(Item(f"{kind}/{number}", kind, record["imgname"], question, str(record["label"])))
    return items


def number(text: str) -> float | None:
    """Return a number, percentages as shares; None if it is none."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def score(prediction: str, item: Item) -> float:
    """Return 1 within 5 % of a number other than 0, or for the same text whatever its case."""
    said, true = number(prediction), number(item.answer)
    if said is not None and true:
        return float(abs(said - true) / abs(true) <= TOLERANCE)
    return float(prediction.lower() == item.answer.lower())


def metrics(pairs: list[Pair]) -> dict[str, float | None]:
    """Return relaxed accuracy in percent, of all and by kind."""
    return {
        "accuracy": percent(score, pairs),
        **{kind: percent(score, [p for p in pairs if p[1].source == kind]) for kind in ("human", "augmented")},
    }


register_task(
    Task(
        name="chartqa",
        protocol="lmms-eval",
        prompt="question, single word",
        read=read_items,
        images=lambda data: FolderImages(image_folder(data, "png")),
        score=score,
        metrics=metrics,
        about="ChartQA test: questions about charts (relaxed accuracy)",
    )
)
