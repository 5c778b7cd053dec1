"""A benchmark of one's own: which colour is the square? Answers stand in a CSV file, images in a folder beside it."""

import csv
from pathlib import Path

from prunetune.evaluation.files import find_file
from prunetune.evaluation.readers import PublishedFiles, images_below
from prunetune.evaluation.tasks import Benchmark, Item, Scorer, register_task

QUESTION = "What colour is the square?\nAnswer the question using a single word or phrase."


def read_items(data: Path) -> list[Item]:
    """Return a question per line of ``colours.csv``: file, colour."""
    with find_file(data, "colours.csv", "https://example.org/colours").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [Item(row["file"], "colours", row["file"], QUESTION, row["colour"]) for row in rows]


def exact_match(prediction: str, item: Item) -> float:
    """Return 1 for the colour's name, whatever its case."""
    return float(prediction.strip().lower() == item.answer)


COLOURS = register_task(
    Benchmark(
        name="colours",
        protocol="exact match",
        prompt="question, short answer",
        about="which colour a square has (an example)",
        readers=[PublishedFiles(read_items, images_below("squares"))],
        scorer=Scorer(exact_match),
    )
)
