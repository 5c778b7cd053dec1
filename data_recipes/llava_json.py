"""Conversations in LLaVA's format: from JSON, JSONL or Parquet, filtered by where their images come from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ijson

from prunetune.data_recipes.parquet import ROW, parquet_rows
from prunetune.data_recipes.sample import DataError, Sample, Turn

PREFIXES = {
    "coco": "coco/",
    "vg": "vg/",
    "gqa": "gqa/",
    "ocr_vqa": "ocr_vqa/",
    "textvqa": "textvqa/",
}
"""Image path prefixes of LLaVA-1.5's mix, by source; ``text`` stands for samples without an image."""

_IMAGE = "<image>"


class PlaceholderError(DataError):
    """A conversation whose placeholders and image disagree."""


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each record of a file with where it stands, for messages.

    JSON lists are streamed, so that a file of a gigabyte does not have to fit in memory.

    Args:
        path: ``llava_v1_5_mix665k.json`` or a file like it: ``.json`` (a list), ``.jsonl`` or ``.parquet``; or a folder
            written by ``Dataset.save_to_disk``.

    Raises:
        DataError: if the file is missing, of another kind, or can't be read.
    """
    path = Path(path)
    if (path / "dataset_info.json").is_file():
        yield from _rows(path)
        return
    if not path.is_file():
        raise DataError(f"data file {path} does not exist; set data.file to llava_v1_5_mix665k.json or a file like it")
    reader = {".json": _json, ".jsonl": _jsonl, ".parquet": _rows}.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"data file {path}: expected .json, .jsonl or .parquet, got {path.suffix or 'no suffix'!r}")
    for where, record in reader(path):
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object with a list `conversations`")
        yield where, record


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as stream:
        # The first character tells a list from an object, whose items ijson would silently not find.
        head = stream.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")
        if head and not head.startswith(b"["):
            raise DataError(f"{path} must hold a list of conversations; it starts with {head[:20]!r}")
        stream.seek(0)
        try:
            for number, record in enumerate(ijson.items(stream, "item", use_float=True)):
                yield f"{path}, record {number}", record
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not valid JSON: {error}") from None


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number} is not valid JSON: {error}") from None


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    for number, record in enumerate(parquet_rows(path)):
        image = record.get("image")
        if isinstance(image, dict):  # an image column: the image itself is in the file, or its path is
            reference = f"{ROW}{number}" if image.get("bytes") else image.get("path")
            record = {**record, "image": reference}
        yield f"{path}, row {number}", record


def parse_record(record: dict[str, Any], where: str, sources: Sequence[str] | None) -> Sample | None:
    """Return a record as a sample, or None if its source is not asked for.

    Args:
        record: ``{"id", "image"?, "conversations": [{"from", "value"}, ...]}``.
        where: where it stands, for messages.
        sources: keys of ``PREFIXES`` or "text"; None takes everything, whatever its prefix.

    Raises:
        DataError: for a malformed record or an unknown prefix.
    """
    if not isinstance(record.get("conversations"), list):
        raise DataError(f"{where}: expected an object with a list `conversations`")
    image = record.get("image")
    if image is not None and not isinstance(image, str):
        raise DataError(f"{where}: `image` is a path, got {type(image).__name__}")
    source = _source(image, where, strict=sources is not None)
    if sources is not None and source not in sources:
        return None
    turns = tuple(_turns(record["conversations"], where, has_image=image is not None))
    name = record.get("id")
    if name is None or name == "":  # 0 is a name
        name = where
    return Sample(str(name), source, image, turns)


def check_sources(sources: Sequence[str]) -> None:
    """Raise DataError for a source that is none of the mix's."""
    unknown = set(sources) - {*PREFIXES, "text"}
    if unknown:
        known = ", ".join([*PREFIXES, "text"])
        raise DataError(f"unknown sources {sorted(unknown)}; there are {known}")


def read_llava(path: str | Path, sources: Sequence[str] | None) -> Iterator[Sample]:
    """Yield the samples of ``sources`` in file order; repeated ids are numbered.

    The published mix holds several conversations per VG image under one id.

    Raises:
        DataError: for a file, source, prefix or record that can't be used, naming it.
    """
    check_sources(sources or ())
    seen: dict[tuple[str, str], int] = {}
    for where, record in read_records(path):
        sample = parse_record(record, where, sources)
        if sample is None:
            continue
        key = sample.source, sample.id
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 1:  # names tell samples apart in messages and results
            sample = replace(sample, id=f"{sample.id}#{seen[key]}")
        yield sample


def _source(image: str | None, where: str, strict: bool) -> str:
    if image is None:
        return "text"
    for source, prefix in PREFIXES.items():
        if image.startswith(prefix):
            return source
    # A recipe that draws from sources would drop such a sample without a word.
    if strict:
        known = ", ".join(PREFIXES.values())
        raise DataError(f"{where}: image path {image!r} starts with none of {known}")
    return "custom"


def _turns(messages: list[Any], where: str, has_image: bool) -> Iterator[Turn]:
    if not messages or len(messages) % 2:
        raise DataError(f"{where}: a conversation alternates human and gpt messages, got {len(messages)} messages")
    placeholders = 0
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise DataError(f"{where}: message {number} has no text `value`")
    for index in range(0, len(messages), 2):
        asked, answered = messages[index], messages[index + 1]
        if (asked.get("from"), answered.get("from")) != ("human", "gpt"):
            raise DataError(
                f"{where}: messages {index} and {index + 1} are from {asked.get('from')!r} and "
                f"{answered.get('from')!r}, expected 'human' and 'gpt'"
            )
        question, answer = asked["value"], answered["value"]
        placeholders += question.count(_IMAGE)
        if _IMAGE in answer:
            raise PlaceholderError(f"{where}: message {index + 1}, an answer, holds {_IMAGE}")
        # The placeholder is left out: the chat template writes the model's own.
        yield Turn(question.replace(_IMAGE, "").strip(), answer.strip())
    if placeholders != int(has_image):
        raise PlaceholderError(f"{where}: {placeholders} {_IMAGE} placeholders, but {int(has_image)} picture")
    # Elsewhere the chat template would move it to the front, and the conversation would be another.
    if has_image and _IMAGE not in messages[0]["value"]:
        raise PlaceholderError(f"{where}: {_IMAGE} must be in the first human message")
