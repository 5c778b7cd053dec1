"""Captions of COCO's validation images of 2017: CIDEr and BLEU over the whole set."""

from __future__ import annotations

from pathlib import Path

from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_in_row
from prunetune.evaluation.readers import PublishedFiles, images_below
from prunetune.evaluation.tasks.base import Benchmark, Item, Scorer, register_task, score_as_a_set
from prunetune.evaluation.tasks.captions import METRICS, PROMPT, coco_captions, summarise

ANNOTATIONS = "captions_val2017.json"
SOURCE = "https://cocodataset.org/#download (annotations, 2017)"


def read_items(data: Path) -> list[Item]:
    """Return a question per image with people's captions."""
    return coco_captions(data, ANNOTATIONS, SOURCE)


def read_row(row: Row, number: int) -> Item:
    """Return a row of lmms-lab's table."""
    # The row's question asks to "carefully observe" the image first; both layouts have to ask the same.
    return Item(str(row["id"]), "coco", image_in_row(number), PROMPT, list(row["answer"]))


register_task(
    Benchmark(
        name="coco_caption",
        protocol="lmms-eval",
        prompt="one-sentence caption",
        about="COCO 2017 validation captions (CIDEr, BLEU)",
        readers=[PublishedFiles(read_items, images_below("val2017")), ParquetRows("coco_caption", read_row)],
        scorer=Scorer(score_as_a_set, summarise, METRICS),
    )
)
