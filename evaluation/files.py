"""Reading the published files of benchmarks, with errors that say what is missing and where to get it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunetune import reading
from prunetune.evaluation.errors import MissingFile, TaskError


def find_file(data: Path, name: str, source: str) -> Path:
    """Return the file called ``name`` in ``data`` or below it.

    Args:
        data: folder of the benchmark's files.
        name: published name of the file.
        source: where to get it, for the message.

    Raises:
        MissingFile: if it is not there.
        TaskError: if it lies there twice.
    """
    if (data / name).is_file():
        return data / name
    # At any depth: archives unpack into folders of their own, and nobody should have to move their files.
    found = sorted(data.rglob(name)) if data.is_dir() else []
    # Two versions of one file may differ, and taking either would decide between them in silence.
    if len(found) > 1:
        raise TaskError(f"{data} holds {name} {len(found)} times ({found[0]}, {found[1]}); name the folder of one")
    if not found:
        raise MissingFile(f"{name} is not in {data}; get it from {source}")
    return found[0]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_json(path: Path) -> Any:
    """Return a JSON file's content; raises TaskError if it is broken."""
    # A download that was cut short is no JSON; one that was an archive is no text either.
    return reading.read_json(path, TaskError)


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number (from 1) and object of every line of a JSONL file that is not empty.

    Raises:
        TaskError: naming the line that is no JSON object.
    """
    # VQAv2's test-dev has 107,394 lines: without its number nobody finds the one that is wrong.
    for number, record in reading.read_json_lines(path, TaskError):
        # A file of bare numbers or lists is valid JSON all the same.
        if not isinstance(record, dict):
            raise TaskError(f"{path}, line {number}: expected an object, got {type(record).__name__}")
        yield number, record


def read_questions(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and question of a file in LLaVA's format: ``question_id``, ``image`` and ``text``.

    Raises:
        TaskError: for a question without one of them, or with a repeated id, naming the line.
    """
    seen: dict[str, int] = {}
    for line, record in read_lines(path):
        # Without an image the question would be asked about nothing, and its answer would count like any other.
        for name in ("question_id", "image", "text"):
            if record.get(name) in (None, ""):
                raise TaskError(f"{path}, line {line}: question {record.get('question_id', '?')} has no {name}")
        # Some files have numbers for ids and others text; what compares them compares text.
        number = str(record["question_id"])
        if number in seen:
            raise TaskError(f"{path}, line {line}: question_id {number} is in line {seen[number]} already")
        seen[number] = line
        yield line, record
