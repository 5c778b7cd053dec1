"""GQA, balanced test-dev: exact match, and the binary and open halves."""

from __future__ import annotations

from pathlib import Path

from prunetune.data_recipes.images import FolderImages
from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.tasks.base import SHORT_ANSWER, Item, Pair, Task, image_folder, percent, register_task

QUESTIONS = "testdev_balanced_questions.json"


def read_items(data: Path) -> list[Item]:
    """Return the balanced questions in the file's order."""
    path = find_file(data, QUESTIONS, "https://cs.stanford.edu/people/dorarad/gqa/download.html (questions1.2.zip)")
    items = []
    for number, record in read_json(path).items():
        if record.get("isBalanced", True):
            kind = "open" if record["types"]["structural"] == "query" else "binary"
            question = f"{record['question']}\n{SHORT_ANSWER}"
            items.append(Item(number, kind, f"{record['imageId']}.jpg", question, record["answer"]))
    return items


def clean(prediction: str) -> str:
    """Return a prediction as LLaVA hands it to GQA's scorer."""
    return prediction.rstrip(".").lower()


def score(prediction: str, item: Item) -> float:
    """Return 1 for the exact answer."""
    return float(clean(prediction) == item.answer)


def metrics(pairs: list[Pair]) -> dict[str, float | None]:
    """Return accuracy in percent, of all, binary and open questions."""
    return {
        "accuracy": percent(score, pairs),
        **{kind: percent(score, [p for p in pairs if p[1].source == kind]) for kind in ("binary", "open")},
    }


register_task(
    Task(
        name="gqa",
        protocol="llava",
        prompt="question, short answer",
        read=read_items,
        images=lambda data: FolderImages(image_folder(data, "images")),
        score=score,
        metrics=metrics,
        about="GQA test-dev balanced: compositional questions (exact match)",
    )
)
