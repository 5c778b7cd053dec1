"""What the caption benchmarks share: files in COCO's format, and metrics that only a whole set has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.metrics.captions import CaptionScores, caption_scores
from prunetune.evaluation.metrics.metric import Metric, Tally, share, tallied
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
    return _scores(*_captions(scored)).metrics


def _captions(scored: Sequence[Scored]) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, tuple[str, ...]], ...]]:
    captions = tuple((one.item.id, one.prediction) for one in scored)
    return captions, tuple((one.item.id, tuple(one.item.answer)) for one in scored)


@lru_cache(maxsize=2)
def _scores(
    captions: tuple[tuple[str, str], ...], references: tuple[tuple[str, tuple[str, ...]], ...]
) -> CaptionScores:
    # Kept, since metrics and interval want the same, and the tokenizer is a Java program of its own.
    return caption_scores(dict(captions), dict(references))


def tally(scored: Sequence[Scored]) -> Tally:
    """Return by image its CIDEr, with the word frequencies of all images, and 1 (U, 2)."""
    scores = _scores(*_captions(scored)).cider
    return tallied([one.item.id for one in scored], [(score, 1.0) for score in scores])


# The weights of words stay those of the whole set when images are drawn: they belong to the benchmark, as its
# references do, and not to the answers whose spread is asked for. BLEU has no column: papers print CIDEr.
METRICS = (
    Metric(
        name="CIDEr",
        unit="score",
        about="CIDEr times 100, as papers print it; pictures are drawn, word frequencies are the whole set's",
        tally=tally,
        value=lambda counts: 100 * share(counts[..., 0], counts[..., 1]),
    ),
)
