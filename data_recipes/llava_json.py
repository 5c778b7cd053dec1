"""Conversations in LLaVA's format: from JSON, JSONL or Parquet, filtered by where their images come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunetune.data_recipes.images import check_inside
from prunetune.data_recipes.parquet import ROW, parquet_rows
from prunetune.data_recipes.sample import DataError, Sample, Turn
from prunetune.data_recipes.videos import VIDEO
from prunetune.reading import read_json_lines, shown

PREFIXES = {
    "coco": "coco/",
    "vg": "vg/",
    "gqa": "gqa/",
    "ocr_vqa": "ocr_vqa/",
    "textvqa": "textvqa/",
}
"""Image path prefixes of LLaVA-1.5's mix, by source; ``text`` stands for samples without an image."""

_IMAGE = "<image>"
_VIDEO = "<video>"


class BrokenRecord(DataError):
    """A record that is no conversation; a recalibration leaves out as many as ``data.max_broken`` tolerates."""


class PlaceholderError(BrokenRecord):
    """A conversation whose image placeholders and image disagree."""


class OutsidePath(DataError):
    """An image path that leaves the image folder; it is never tolerated."""


def read_records(path: str | Path) -> Iterator[tuple[str, Any]]:
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
    yield from reader(path)


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as stream:
        import ijson  # of the data extra: naming recipes and formatting samples need it not

        # The first character tells a list from an object, whose items ijson would silently not find.
        head = stream.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")
        if not head:
            raise DataError(f"{path} is empty, expected a list of conversations")
        if not head.startswith(b"["):
            raise DataError(f"{path} must hold a list of conversations; it starts with {head[:20]!r}")
        stream.seek(0)
        number = 0
        try:
            for record in ijson.items(stream, "item", use_float=True):
                yield f"{path}, record {number}", record
                number += 1
        except (ijson.JSONError, ValueError, RecursionError) as error:  # ValueError: text that is no UTF-8
            reason = str(error).partition("\n")[0]  # below it the parser draws an excerpt
            raise DataError(f"{path}, record {number} is not valid JSON: {reason}") from None


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, record in read_json_lines(path, DataError):
        yield f"{path}, line {number}", record


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    for number, record in enumerate(parquet_rows(path)):
        image = record.get("image")
        if isinstance(image, dict):  # an image column: the image itself is in the file, or its path is
            reference = f"{ROW}{number}" if image.get("bytes") else image.get("path")
            record = {**record, "image": reference}
        yield f"{path}, row {number}", record


def parse_record(record: Any, where: str, sources: Sequence[str] | None, questions: bool = False) -> Sample | None:
    """Return a record as a sample, or None if its source is not asked for.

    A first message that is not the human's is dropped, as LLaVA's own preprocessing does.

    Args:
        record: ``{"id", "image"? or "video"?, "conversations": [{"from", "value"}, ...]}``.
        where: file and position, for messages.
        sources: keys of ``PREFIXES``, "text" or "video"; None takes everything, whatever its prefix.
        questions: read what the human asks alone; answers may be there or not.

    Raises:
        BrokenRecord: for a record that is no conversation.
        DataError: for an unknown prefix, or an image path that leaves its folder.
    """
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise BrokenRecord(f"{where}: expected an object with a list `conversations`")
    image = record.get("image")
    video = record.get("video")
    for key, value in (("image", image), ("video", video)):
        if value is not None and not isinstance(value, str):
            raise BrokenRecord(f"{where}: `{key}` is a path, got {type(value).__name__}")
    if image is not None and video is not None:
        raise BrokenRecord(f"{where}: a conversation is about an image or a video, and this one has both")
    name = record.get("id")
    if name is None or name == "":  # 0 is a name
        name = where
    for path in (image, video):
        if path is not None:
            _check_path(path, f"{where}: sample {shown(name)}")
    source = "video"
    if video is None:
        source = _source(image, where, strict=sources is not None)
    if sources is not None and source not in sources:
        return None
    reference = image if video is None else f"{VIDEO}{video}"
    messages = record["conversations"] if video is None else _with_one_placeholder(record["conversations"])
    read = _questions if questions else _turns
    turns = tuple(read(messages, where, has_image=reference is not None))
    sample = Sample(str(name), source, reference, turns)
    _check_text(sample, where)
    return sample


def _check_path(image: str, where: str) -> None:
    try:
        check_inside(image, where)
    except DataError as error:
        raise OutsidePath(str(error)) from None


def _check_text(sample: Sample, where: str) -> None:
    """Check that all text of a sample can be written: JSON can spell half of a character."""
    texts = [sample.id, sample.image or ""]
    for turn in sample.turns:
        texts += [turn.question, turn.answer or ""]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise BrokenRecord(f"{where}: {error}") from None


def check_sources(sources: Sequence[str]) -> None:
    """Raise DataError for a source that is none of the mix's."""
    unknown = set(sources) - {*PREFIXES, "text", "video"}
    if unknown:
        known = ", ".join([*PREFIXES, "text", "video"])
        raise DataError(f"unknown sources {sorted(unknown)}; there are {known}")


def read_llava(
    path: str | Path, sources: Sequence[str] | None, questions: bool = False
) -> Iterator[Sample | BrokenRecord]:
    """Yield the samples of ``sources`` in file order, and what is wrong with a record that is none; ids are numbered.

    The published mix holds several conversations per VG image under one id. With ``questions`` turns have no answer.

    Raises:
        DataError: for a file, source, prefix or image path that can't be used, naming it.
    """
    check_sources(sources or ())
    seen: dict[tuple[str, str], int] = {}
    for where, record in read_records(path):
        try:
            sample = parse_record(record, where, sources, questions)
        except BrokenRecord as error:
            yield error
            continue
        if sample is None:
            continue
        key = sample.source, sample.id
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 1:  # names tell samples apart in messages and results
            sample = replace(sample, id=f"{sample.id}#{seen[key]}")
        yield sample


def _with_one_placeholder(messages: list[Any]) -> list[Any]:
    """Return a conversation about a video with ``<image>`` for ``<video>``: data sets write the one or the other."""
    written = []
    for message in messages:
        if isinstance(message, dict) and isinstance(message.get("value"), str):
            message = {**message, "value": message["value"].replace(_VIDEO, _IMAGE)}
        written.append(message)
    return written


def _source(image: str | None, where: str, strict: bool) -> str:
    if image is None:
        return "text"
    for source, prefix in PREFIXES.items():
        if image.startswith(prefix):
            return source
    # A recipe that draws from sources would drop such a sample without a word.
    if strict:
        raise DataError(f"{where}: image path {image!r} starts with none of {', '.join(PREFIXES.values())}")
    return "custom"


def _turns(messages: list[Any], where: str, has_image: bool) -> Iterator[Turn]:
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise BrokenRecord(f"{where}: message {number} has no text `value`")
    # LLaVA's preprocessing drops a first message that is not the human's, and it alone.
    first = 1 if messages and messages[0].get("from") == "gpt" else 0
    if len(messages) == first or (len(messages) - first) % 2:
        asks = len(messages) > first and messages[-1].get("from") == "human"
        raise BrokenRecord(
            f"{where}: a conversation alternates human and gpt messages, got {len(messages)} messages"
            + (", the last a question without an answer: `prunetune answers` writes the model's own" if asks else "")
        )
    placeholders = 0
    for index in range(first, len(messages), 2):
        asked, answered = messages[index], messages[index + 1]
        if (asked.get("from"), answered.get("from")) != ("human", "gpt"):
            raise BrokenRecord(
                f"{where}: messages {index} and {index + 1} are from {shown(asked.get('from'))} and "
                f"{shown(answered.get('from'))}, expected 'human' and 'gpt'"
            )
        placeholders += asked["value"].count(_IMAGE)
        if _IMAGE in answered["value"]:
            raise PlaceholderError(f"{where}: message {index + 1}, an answer, holds {_IMAGE}")
        yield Turn(_without_placeholder(asked["value"]), answered["value"])
    _check_placeholders(placeholders, messages[first], where, has_image)


def _questions(messages: list[Any], where: str, has_image: bool) -> Iterator[Turn]:
    """Yield what the human asks, without the answers that may be there."""
    placeholders = 0
    asked = [message for message in messages if isinstance(message, dict) and message.get("from") == "human"]
    if not asked:
        raise BrokenRecord(f"{where}: no message is from 'human', so nothing is asked")
    for message in asked:
        if not isinstance(message.get("value"), str):
            raise BrokenRecord(f"{where}: a question has no text `value`")
        placeholders += message["value"].count(_IMAGE)
        yield Turn(_without_placeholder(message["value"]), None)
    _check_placeholders(placeholders, asked[0], where, has_image)


def _without_placeholder(question: str) -> str:
    # As LLaVA does: the turn of the image is stripped, and no other; its chat template breaks the line.
    return question.replace(_IMAGE, "").strip() if _IMAGE in question else question


def _check_placeholders(placeholders: int, first: Any, where: str, has_image: bool) -> None:
    if placeholders != int(has_image):
        raise PlaceholderError(f"{where}: {placeholders} {_IMAGE} placeholders, but {int(has_image)} image")
    if has_image and _IMAGE not in first["value"]:
        raise PlaceholderError(f"{where}: {_IMAGE} must be in the first human message")
