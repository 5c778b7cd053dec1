"""LLaVA's instruction file: a JSON list of conversations, filtered by where their pictures come from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_recipes.sample import DataError, Sample, Turn

PREFIXES = {
    "coco": "coco/",
    "vg": "vg/",
    "gqa": "gqa/",
    "ocr_vqa": "ocr_vqa/",
    "textvqa": "textvqa/",
}
"""Image path prefixes of the mix, by source; ``text`` stands for samples without a picture."""

_IMAGE = "<image>"


def read_llava_json(path: str | Path, sources: list[str]) -> list[Sample]:
    """Return the samples of ``sources`` in file order.

    Args:
        path: ``llava_v1_5_mix665k.json`` or a file of its format.
        sources: keys of ``PREFIXES``, or "text".

    Raises:
        DataError: for a missing or unreadable file, an unknown source or prefix, or a malformed record, naming it.
    """
    unknown = set(sources) - {*PREFIXES, "text"}
    if unknown:
        raise DataError(f"unknown sources {sorted(unknown)}; there are {', '.join([*PREFIXES, 'text'])}")
    samples = list(_samples(Path(path), sources))
    if not samples:
        raise DataError(f"{path} has no sample of {', '.join(sources)}")
    twice = [name for name, count in Counter((s.source, s.id) for s in samples).items() if count > 1]
    return _with_distinct_ids(samples) if twice else samples


def _with_distinct_ids(samples: list[Sample]) -> list[Sample]:
    """Number repeated ids; the published mix holds several conversations per VG picture under one id."""
    seen: Counter[tuple[str, str]] = Counter()
    result = []
    for sample in samples:
        seen[sample.source, sample.id] += 1
        number = seen[sample.source, sample.id]
        name = sample.id if number == 1 else f"{sample.id}#{number}"
        result.append(Sample(name, sample.source, sample.image, sample.turns))
    return result


def _samples(path: Path, sources: list[str]) -> Iterator[Sample]:
    if not path.is_file():
        raise DataError(f"data file {path} does not exist; set data.file to llava_v1_5_mix665k.json or a file like it")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(records, list):
        raise DataError(f"{path} must hold a list of conversations, but holds {type(records).__name__}")
    for number, record in enumerate(records):
        where = f"{path}, record {number}"
        if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
            raise DataError(f"{where}: expected an object with a list `conversations`")
        image = record.get("image")
        source = _source(image, where)
        if source in sources:
            turns = tuple(_turns(record["conversations"], where, has_image=image is not None))
            yield Sample(str(record.get("id", "")) or where, source, image, turns)


def _source(image: str | None, where: str) -> str:
    if image is None:
        return "text"
    for source, prefix in PREFIXES.items():
        if image.startswith(prefix):
            return source
    raise DataError(f"{where}: image path {image!r} starts with none of {', '.join(PREFIXES.values())}")


def _turns(messages: list[Any], where: str, has_image: bool) -> Iterator[Turn]:
    if not messages or len(messages) % 2:
        raise DataError(f"{where}: a conversation alternates human and gpt messages, got {len(messages)} messages")
    placeholders = 0
    for index in range(0, len(messages), 2):
        asked, answered = messages[index], messages[index + 1]
        for number, message in ((index, asked), (index + 1, answered)):
            if not isinstance(message, dict) or not isinstance(message.get("value"), str):
                raise DataError(f"{where}: message {number} has no text `value`")
        if (asked.get("from"), answered.get("from")) != ("human", "gpt"):
            raise DataError(
                f"{where}: messages {index} and {index + 1} are from {asked.get('from')!r} and "
                f"{answered.get('from')!r}, expected 'human' and 'gpt'"
            )
        placeholders += asked["value"].count(_IMAGE)
        if _IMAGE in answered["value"]:
            raise DataError(f"{where}: message {index + 1}, an answer, holds {_IMAGE}")
        yield Turn(asked["value"].replace(_IMAGE, "").strip(), answered["value"].strip())
    if placeholders != int(has_image):
        raise DataError(f"{where}: {placeholders} {_IMAGE} placeholders, but {int(has_image)} picture")
    if has_image and _IMAGE not in messages[0]["value"]:
        raise DataError(f"{where}: {_IMAGE} must be in the first human message")
