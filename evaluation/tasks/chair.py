"""CHAIR on COCO: objects that a detailed description invents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunetune.data_recipes.images import FolderImages
from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.metrics.chair import Objects, chair
from prunetune.evaluation.tasks.base import Item, Pair, Task, image_folder, register_task

PROMPT = "Please describe this image in detail."
COCO = "https://cocodataset.org/#download (annotations, 2014)"
SYNONYMS = "https://github.com/LisaAnne/Hallucination (data/synonyms.txt)"


def read_items(data: Path) -> list[Item]:
    """Return a question per picture with the objects that segmentations or people's captions show in it."""
    lines = find_file(data, "synonyms.txt", SYNONYMS).read_text(encoding="utf-8").splitlines()
    objects = Objects(lines)
    instances = read_json(find_file(data, "instances_val2014.json", COCO))
    categories = {record["id"]: objects.names.get(record["name"], record["name"]) for record in instances["categories"]}
    truth: dict[int, set[str]] = {record["id"]: set() for record in instances["images"]}
    for record in instances["annotations"]:
        truth[record["image_id"]].add(categories[record["category_id"]])
    for record in read_json(find_file(data, "captions_val2014.json", COCO))["annotations"]:
        if record["image_id"] in truth:
            truth[record["image_id"]] |= set(objects.of(record["caption"]))
    items = []
    for image in instances["images"]:
        answer = {"objects": sorted(truth[image["id"]]), "words": lines}
        items.append(Item(str(image["id"]), "coco", image["file_name"], PROMPT, answer))
    return items


def metrics(pairs: list[Pair]) -> dict[str, Any]:
    """Return C_S, C_I, recall and length."""
    objects = Objects(pairs[0][1].answer["words"])
    return chair(
        {item.id: text for text, item in pairs}, {item.id: set(item.answer["objects"]) for _, item in pairs}, objects
    )


register_task(
    Task(
        name="chair",
        protocol="chair",
        prompt="describe in detail",
        read=read_items,
        images=lambda data: FolderImages(image_folder(data, "val2014")),
        score=None,
        metrics=metrics,
        notes=("plurals are resolved by inflect; the published script used another library",),
        about="CHAIR on COCO val2014: objects that descriptions invent (C_S, C_I, recall, length)",
    )
)
