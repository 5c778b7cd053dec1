"""Captions of COCO and NoCaps pictures: CIDEr and BLEU over the whole set."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from prunetune.data_recipes.images import FolderImages
from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.metrics.captions import caption_metrics
from prunetune.evaluation.tasks.base import Item, Pair, Task, TaskError, image_folder, register_task

PROMPT = "Provide a one-sentence caption for the provided image."
SETS = {
    "coco_caption": ("captions_val2017.json", "val2017", "https://cocodataset.org/#download (annotations, 2017)"),
    "nocaps": ("nocaps_val_4500_captions.json", "val", "https://nocaps.org/download"),
}


def read_items(file: str, source: str, data: Path) -> list[Item]:
    """Return a question per picture with all its captions; the source is NoCaps' domain, or "coco".

    Raises:
        TaskError: for a picture without captions.
    """
    path = find_file(data, file, source)
    content = read_json(path)
    captions: dict[str, list[str]] = {}
    for record in content["annotations"]:
        captions.setdefault(str(record["image_id"]), []).append(record["caption"])
    items = []
    for image in content["images"]:
        number = str(image["id"])
        if number not in captions:
            raise TaskError(f"{path}: image {number} has no caption")
        items.append(Item(number, image.get("domain", "coco"), image["file_name"], PROMPT, captions[number]))
    return items


def metrics(pairs: list[Pair]) -> dict[str, Any]:
    """Return CIDEr and BLEU of all captions and, with several domains, of each."""
    domains = sorted({item.source for _, item in pairs})
    result: dict[str, Any] = _corpus(pairs)
    if len(domains) > 1:
        result["by_domain"] = {name: _corpus([pair for pair in pairs if pair[1].source == name]) for name in domains}
    return result


def _corpus(pairs: list[Pair]) -> dict[str, float]:
    return caption_metrics({i.id: text for text, i in pairs}, {i.id: i.answer for _, i in pairs})


def open_images(folder: str, data: Path) -> FolderImages:
    """Return the pictures."""
    return FolderImages(image_folder(data, folder))


for _name, (_file, _folder, _source) in SETS.items():
    register_task(
        Task(
            name=_name,
            protocol="lmms-eval",
            prompt="one-sentence caption",
            read=partial(read_items, _file, _source),
            images=partial(open_images, _folder),
            score=None,
            metrics=metrics,
            about=f"{'COCO 2017' if _name == 'coco_caption' else 'NoCaps'} validation captions (CIDEr, BLEU)",
        )
    )
