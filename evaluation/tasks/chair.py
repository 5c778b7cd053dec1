"""CHAIR on COCO: objects that a detailed description invents."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.metrics.chair import Objects, chair, count
from prunetune.evaluation.metrics.metric import Metric, Tally, share, tallied
from prunetune.evaluation.readers import PublishedFiles, images_below
from prunetune.evaluation.tasks.base import (
    Benchmark,
    Item,
    Pairing,
    Prediction,
    Scored,
    Scorer,
    register_task,
    score_as_a_set,
)

# Long descriptions on purpose: one sentence leaves little room to invent anything.
PROMPT = "Please describe this image in detail."
COCO = "https://cocodataset.org/#download (annotations, 2014)"
SUBSET = "chair_images.txt"
"""Ids or file names of the images that are described, one a line: papers take 500 of the 40,504, each its own."""
# COCO_val2014_000000000042.jpg, with or without its extension.
_NUMBER = re.compile(r"^(?:COCO_val2014_)?0*(\d+)(?:\.jpg)?$")
SYNONYMS = "https://github.com/LisaAnne/Hallucination (data/synonyms.txt)"


def read_items(data: Path) -> list[Item]:
    """Return a question per image with the objects that segmentations or people's captions show in it.

    Where the folder has a list of images, :data:`SUBSET`, it is these alone, in the list's order.

    Raises:
        TaskError: for an image of the list that the annotations do not have.
    """
    lines = find_file(data, "synonyms.txt", SYNONYMS).read_text(encoding="utf-8").splitlines()
    objects = Objects(lines)
    instances = read_json(find_file(data, "instances_val2014.json", COCO))
    categories = {}
    for record in instances["categories"]:
        # By the vocabulary's word for it, so that segmentations and captions name the same thing alike.
        categories[record["id"]] = objects.names.get(record["name"], record["name"])
    truth: dict[int, set[str]] = {}
    for record in instances["images"]:
        truth[record["id"]] = set()
    for record in instances["annotations"]:
        truth[record["image_id"]].add(categories[record["category_id"]])
    # Segmentations leave out what is small or hidden; what a person mentions is there as well.
    for record in read_json(find_file(data, "captions_val2014.json", COCO))["annotations"]:
        if record["image_id"] in truth:
            truth[record["image_id"]] |= set(objects.of(record["caption"]))
    items = []
    for image in _subset(instances["images"], data):
        # The vocabulary is part of the answer: results.jsonl alone is then enough to compute the metrics again.
        answer = {"objects": sorted(truth[image["id"]]), "words": lines}
        items.append(Item(str(image["id"]), "coco", image["file_name"], PROMPT, answer))
    return items


def _subset(images: list[dict[str, Any]], data: Path) -> list[dict[str, Any]]:
    """Return the images that the folder's list names, by id or file name; all of them without a list."""
    path = data / SUBSET
    if not path.is_file():
        return images
    known = {}
    for image in images:
        known[str(image["id"])] = known[image["file_name"]] = image
    found = []
    for line, name in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not name.strip():
            continue
        if name.strip() not in known:
            raise TaskError(
                f"{path}, line {line}: image {name.strip()!r} is not in instances_val2014.json; expected "
                "an id or a file name of val2014"
            )
        found.append(known[name.strip()])
    return found


def item_ids(predictions: list[Prediction], data: Path, where: str) -> list[str]:
    """Return the image of each prediction, whose id may be the image's number or its file's name."""
    ids = []
    for prediction in predictions:
        number = _NUMBER.search(prediction.id)
        ids.append(str(int(number.group(1))) if number else prediction.id)
    return ids


def summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return C_S, C_I, recall and length."""
    objects = _objects(tuple(scored[0].item.answer["words"]))  # the same for all items
    captions = {}
    truth = {}
    for one in scored:
        captions[one.item.id] = one.prediction
        truth[one.item.id] = set(one.item.answer["objects"])
    return chair(captions, truth, objects)


@lru_cache(maxsize=4)
def _objects(lines: tuple[str, ...]) -> Objects:
    return Objects(lines)


def tally(scored: Sequence[Scored]) -> Tally:
    """Return by image 1 and the six numbers of :class:`Count` (U, 7)."""
    objects = _objects(tuple(scored[0].item.answer["words"]))
    rows = [[1, *count(one.prediction, set(one.item.answer["objects"]), objects)] for one in scored]
    return tallied([one.item.id for one in scored], rows)


def _metric(name: str, about: str, part: int, whole: int, higher: bool) -> Metric:
    """Return the share in percent of one count in another."""
    return Metric(
        name=name,
        unit="%",
        about=f"{about}; pictures are drawn",
        tally=tally,
        value=lambda counts: 100 * share(counts[..., part], counts[..., whole]),
        higher=higher,
    )


METRICS = (
    _metric("C_S", "CHAIR_s: captions that name an object which is not there", 1, 0, higher=False),
    _metric("C_I", "CHAIR_i: mentions of objects that are not there", 3, 2, higher=False),
    _metric("recall", "objects of the picture that the caption names", 5, 4, higher=True),
)


register_task(
    Benchmark(
        name="chair",
        protocol="chair",
        prompt="describe in detail",
        about="CHAIR on COCO val2014: objects that descriptions invent (C_S, C_I, recall, length)",
        readers=[PublishedFiles(read_items, images_below("val2014"))],
        scorer=Scorer(score_as_a_set, summarise, METRICS),
        pairing=Pairing(item_ids, subset=True),
        notes=(
            "plurals are resolved by inflect, and only to words of the vocabulary; the published script used pattern",
            "images without a description are left out, as papers describe some hundreds of them",
        ),
    )
)
