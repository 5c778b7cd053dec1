"""What the caption benchmarks share: files in COCO's format, and metrics that only a whole set has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.metrics.captions import caption_metrics
from prunetune.evaluation.tasks.base import Item, Scored

# lmms-eval's, for both sets alike: LLaVA-1.5's scripts have neither.
PROMPT = "Provide a one-sentence caption for the provided image."


def coco_captions(data: Path, file: str, source: str) -> list[Item]:
    """Return a question per image with all its captions; the source is NoCaps' domain, or "coco".

    Args:
        data: folder of the files.
        file: name of the annotations in COCO's format.
        source: where to get them, for messages.

    Raises:
        TaskError: for an image without captions.
    """
    path = find_file(data, file, source)
    content = read_json(path)
    captions: dict[str, list[str]] = {}
    for record in content["annotations"]:
        captions.setdefault(str(record["image_id"]), []).append(record["caption"])
    items = []
    for image in content["images"]:
        number = str(image["id"])
        # Captions of test splits are hidden; CIDEr against nothing would be 0, and look like a bad caption's.
        if number not in captions:
            raise TaskError(f"{path}: image {number} has no caption")
        items.append(Item(number, image.get("domain", "coco"), image["file_name"], PROMPT, captions[number]))
    return items


def summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return CIDEr and BLEU of all captions and, with several domains, of each."""
    domains: dict[str, list[Scored]] = {}
    for one in scored:
        domains.setdefault(one.item.source, []).append(one)
    metrics: dict[str, Any] = _corpus(scored)
    # CIDEr weighs words by how rare they are in the set, so a domain's is computed anew: the whole is no mean of them.
    if len(domains) > 1:
        metrics["by_domain"] = {name: _corpus(domains[name]) for name in sorted(domains)}
    return metrics


def _corpus(scored: Sequence[Scored]) -> dict[str, float]:
    captions = {}
    references = {}
    for one in scored:
        captions[one.item.id] = one.prediction
        references[one.item.id] = one.item.answer
    return caption_metrics(captions, references)
