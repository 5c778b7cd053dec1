"""ChartQA, test: human and augmented questions, relaxed accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_in_row
from prunetune.evaluation.readers import PublishedFiles, images_below
from prunetune.evaluation.tasks.base import ACCURACY, Benchmark, Item, Scored, Scorer, averaged, register_task

SOURCE = "https://github.com/vis-nlp/ChartQA (ChartQA Dataset/test)"
KINDS = ("human", "augmented")
# Values are read off axes, so ChartQA's authors count a number within 5 % as right.
TOLERANCE = 0.05


def read_items(data: Path) -> list[Item]:
    """Return human questions, then augmented ones; ids are ``KIND/NUMBER``, since the records have none."""
    items = []
    for kind in KINDS:
        records = read_json(find_file(data, f"test_{kind}.json", SOURCE))
        for number, record in enumerate(records):
            items.append(item_of(number, kind, record["imgname"], record["query"], record["label"]))
    return items


def read_row(row: Row, number: int) -> Item:
    """Return a row of lmms-lab's table."""
    kind = "human" if "human" in row["type"] else "augmented"
    answer = row["answer"]
    if isinstance(answer, list):  # some tables wrap the one answer
        answer = answer[0]
    return item_of(number, kind, image_in_row(number), row["question"], answer)


# lmms-eval's wording, since this is its protocol: LLaVA-1.5's scripts have no ChartQA.
def item_of(number: int, kind: str, image: str, question: str, answer: Any) -> Item:
    """Return a question as lmms-eval asks it; the source is its kind."""
    prompt = f"{question}\nAnswer the question with a single word."
    return Item(f"{kind}/{number}", kind, image, prompt, str(answer))


def number(text: str) -> float | None:
    """Return a number, percentages as shares; None if it is none."""
    # "1,000" is none, as in the published scorer: float() takes no comma.
    try:
        if text.endswith("%"):
            return float(text.rstrip("%")) / 100
        return float(text)
    except ValueError:
        return None


def score(prediction: str, item: Item) -> float:
    """Return 1 within 5 % of a number other than 0, or for the same text whatever its case."""
    said, true = number(prediction), number(item.answer)
    # No share of 0 can be tolerated, so 0 is compared as text, as lmms-eval does: "0.0" is wrong then.
    if said is not None and true:
        return float(abs(said - true) / abs(true) <= TOLERANCE)
    return float(prediction.lower() == item.answer.lower())


def summarise(scored: Sequence[Scored]) -> dict[str, float | None]:
    """Return relaxed accuracy in percent, of all and by kind."""
    # Papers report the mean of the two kinds; they are of the same size (1,250), so it is the accuracy over all.
    mean = averaged(scored)
    metrics = {"accuracy": mean.overall}
    for kind in KINDS:
        metrics[kind] = mean.by_source.get(kind)
    return metrics


register_task(
    Benchmark(
        name="chartqa",
        protocol="lmms-eval",
        prompt="question, single word",
        about="ChartQA test: questions about charts (relaxed accuracy)",
        readers=[PublishedFiles(read_items, images_below("png")), ParquetRows("chartqa", read_row)],
        scorer=Scorer(score, summarise, (replace(ACCURACY, about="relaxed accuracy; pictures are drawn"),)),
        source_is="kind",
    )
)
