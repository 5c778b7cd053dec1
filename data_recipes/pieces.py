"""The scores of a SentencePiece model file, which say in what order its pieces are merged."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

SPACE = "▁"
"""How SentencePiece, and Llama's tokenizer after it, writes a space."""
Merges = Sequence[tuple[str, str]]
"""The pairs that a BPE merges, the first to be merged first."""
_PIECES, _TEXT, _SCORE = 1, 1, 2  # numbers of fields: of the model, and of a piece
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5  # kinds of protobuf's fields


def scores_of(path: Path) -> dict[str, float] | None:
    """Return the score of every piece of a ``tokenizer.model``; None if the file is none, or is broken."""
    scores: dict[str, float] = {}
    try:
        for field, value in _fields(path.read_bytes()):
            if field != _PIECES or not isinstance(value, bytes):
                continue
            text, score = "", 0.0
            for part, content in _fields(value):
                if part == _TEXT and isinstance(content, bytes):
                    text = content.decode()
                elif part == _SCORE and isinstance(content, bytes):
                    (score,) = struct.unpack("<f", content)
            scores[text] = score
    except (OSError, ValueError, IndexError, struct.error):
        return None
    return scores or None


def ordered(merges: Merges, ids: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]] | None:
    """Return a BPE's pairs as SentencePiece merges them: by the score of what they make, the highest first.

    Ties go to the lower id of that, then to the lower ids of the left and of the right part. None if a piece has no
    score.
    """
    ranked = []
    for left, right in merges:
        whole = left + right
        if whole not in scores or whole not in ids:
            return None
        ranked.append(((-scores[whole], ids[whole], ids[left], ids[right]), (left, right)))
    ranked.sort()
    return [pair for _, pair in ranked]


def spaces_last(merges: Merges) -> list[tuple[str, str]]:
    """Return pairs with those that merge spaces alone behind all others, as in Llama's own files.

    ``[("▁", "▁"), ("▁", "t")]`` becomes ``[("▁", "t"), ("▁", "▁")]``.
    """
    words: list[tuple[str, str]] = []
    spaces: list[tuple[str, str]] = []
    for left, right in merges:
        of_spaces = not (left + right).strip(SPACE)
        (spaces if of_spaces else words).append((left, right))
    return words + spaces


def _fields(content: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield number and value of each field of a protobuf message; raises IndexError or ValueError if it is none."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        field, kind = key >> 3, key & 7
        if kind == _VARINT:
            number, at = _varint(content, at)
            yield field, number
            continue
        if kind == _BYTES:
            length, at = _varint(content, at)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            length = 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"field {field} is of kind {kind}")
        if at + length > len(content):
            raise IndexError("the message ends within a field")
        yield field, content[at : at + length]
        at += length


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, the lowest first, and where it ends."""
    number, shift = 0, 0
    while True:
        byte = content[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at
