"""Reading text, JSON and YAML that people edit and crashes cut short: every fault is one line that names the file."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunetune.errors import PrunetuneError

Kind = type[PrunetuneError]
"""Which error is raised: files are read here alike, and belong to different parts of the package."""

_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def one_line(error: BaseException) -> str:
    """Return a library's message in one line; its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def shown(value: Any) -> str:
    """Return a value for a message: its ``repr``, cut where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return short.repr(value)


def read_text(path: Path, kind: Kind) -> str:
    """Return a UTF-8 file's text; raises ``kind`` if it can't be read or is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise kind(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise kind(f"{path} can't be read: {error.strerror}") from None


def read_json(path: Path, kind: Kind) -> Any:
    """Return a JSON file's content; raises ``kind`` if there is none."""
    return parse_json(read_text(path, kind), str(path), kind)


def parse_json(text: str, where: str, kind: Kind) -> Any:
    """Return the content of JSON text; raises ``kind``, its message beginning with ``where``, if it is none."""
    if not text.strip():
        raise kind(f"{where} is empty, expected JSON")
    try:
        value = json.loads(text)
        # JSON can spell half of a character (\ud800), which Python reads and nothing can write again.
        if _HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise kind(f"{where} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:  # bad syntax, a number of 5,000 digits, half a character
        raise kind(f"{where} is not valid JSON: {one_line(error)}") from None
    return value


def read_json_lines(path: Path, kind: Kind) -> Iterator[tuple[int, Any]]:
    """Yield line number (from 1) and value of every line of a JSONL file that is not empty.

    Raises:
        kind: naming the line that is no JSON, such as the last one of a file that was cut short.
    """
    try:
        # As bytes, so that text which is no UTF-8 is found in its line.
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, _parse_line(line, f"{path}, line {number}", kind)
    except OSError as error:
        raise kind(f"{path} can't be read: {error.strerror}") from None


def _parse_line(line: bytes, where: str, kind: Kind) -> Any:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise kind(f"{where} is not UTF-8 text: {error}") from None
    return parse_json(text, where, kind)


def read_yaml(path: Path, kind: Kind, loader: Any = None) -> Any:
    """Return a YAML file's content; raises ``kind`` if there is none. The loader is PyYAML's safe one or alike."""
    return parse_yaml(read_text(path, kind), str(path), kind, loader)


def parse_yaml(text: str, where: str, kind: Kind, loader: Any = None) -> Any:
    """Return the content of YAML text; raises ``kind``, its message beginning with ``where``, if it is none."""
    import yaml  # most of what imports this module reads no YAML

    try:
        value = yaml.load(text, Loader=loader or yaml.SafeLoader)
        written = json.dumps(value, default=str, ensure_ascii=False)  # refuses a value that holds itself
        written.encode()  # and this half a character
    except yaml.MarkedYAMLError as error:
        raise kind(f"{where} is not valid YAML: {_marked(error)}") from None
    except RecursionError:
        raise kind(f"{where} is not valid YAML: it is nested too deeply") from None
    # ValueError and the like: PyYAML hands on what Python says of dates (2024-13-01) and numbers (0x_) that are none.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise kind(f"{where} is not valid YAML: {one_line(error)}") from None
    if "\\u0000" in written:  # no file, and no line of a terminal, can hold it
        raise kind(f"{where} is not valid YAML: it holds a NUL character")
    return value


def _marked(error: Any) -> str:
    """Return a YAML error with its line, without the excerpt that PyYAML draws over several lines."""
    mark = error.problem_mark or error.context_mark
    line = "" if mark is None else f"line {mark.line + 1}: "
    return line + " ".join(str(part) for part in (error.context, error.problem) if part)
