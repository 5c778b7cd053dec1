"""Captions of NoCaps' validation images, which show more kinds of objects than COCO's: CIDEr and BLEU by domain."""

from __future__ import annotations

from pathlib import Path

from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_in_row
from prunetune.evaluation.readers import PublishedFiles, images_below
from prunetune.evaluation.tasks.base import Benchmark, Item, Scorer, register_task, score_as_a_set
from prunetune.evaluation.tasks.captions import METRICS, PROMPT, coco_captions, summarise

ANNOTATIONS = "nocaps_val_4500_captions.json"
SOURCE = "https://nocaps.org/download"


def read_items(data: Path) -> list[Item]:
    """Return a question per image with people's captions; the source is the domain."""
    return coco_captions(data, ANNOTATIONS, SOURCE)


def read_row(row: Row, number: int) -> Item:
    """Return a row of lmms-lab's table."""
    # The domain says whether COCO has the objects: out of it, captions rest on what the model saw elsewhere.
    domain = str(row.get("image_domain") or "nocaps")
    return Item(str(row["image_id"]), domain, image_in_row(number), PROMPT, list(row["annotations_captions"]))


register_task(
    Benchmark(
        name="nocaps",
        protocol="lmms-eval",
        prompt="one-sentence caption",
        about="NoCaps validation captions (CIDEr, BLEU)",
        readers=[PublishedFiles(read_items, images_below("val")), ParquetRows("nocaps", read_row)],
        source_is="domain",
        scorer=Scorer(score_as_a_set, summarise, METRICS),
    )
)
