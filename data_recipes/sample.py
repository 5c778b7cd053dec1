"""One training or evaluation sample, and the errors that bad data raise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunetune.errors import PrunetuneError


class DataError(PrunetuneError):
    """Data that can't be used; the message names the file or sample and what to do."""


@dataclass(frozen=True)
class Turn:
    """One question and its answer; the answer is None in a prompt."""

    question: str
    answer: str | None


@dataclass(frozen=True)
class Sample:
    """A conversation about at most one image or video; ``image`` is a reference that the recipe's opener knows."""

    id: str
    source: str
    image: str | None
    turns: tuple[Turn, ...]

    def to_row(self) -> dict[str, Any]:
        """Return the sample as a row of a `datasets.Dataset`."""
        turns = [{"question": turn.question, "answer": turn.answer} for turn in self.turns]
        return {"id": self.id, "source": self.source, "image": self.image, "turns": turns}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Sample:
        """Return the sample of a row."""
        turns = []
        for turn in row["turns"]:
            turns.append(Turn(turn["question"], turn["answer"]))
        return cls(row["id"], row["source"], row["image"], tuple(turns))


def samples_of(columns: Mapping[str, Sequence[Any]]) -> list[Sample]:
    """Return the samples of many rows, given by column: a look-up of each row by itself takes ten times as long."""
    rows = zip(*columns.values(), strict=True)
    return [Sample.from_row(dict(zip(columns, values, strict=True))) for values in rows]
