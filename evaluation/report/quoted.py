"""Rows quoted from papers: shown beside measured ones, marked, and never part of a computation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.reading import read_yaml, shown

# All four or none: a number without its budget or its source can't be read beside others.
FIELDS = ("arm", "kept", "values", "cite")


@dataclass(frozen=True)
class Quoted:
    """One row of a paper's table.

    Attributes:
        arm: what was measured there.
        kept: visual tokens.
        values: numbers by column: a source of our table, or "overall".
        cite: where it stands.
    """

    arm: str
    kept: float
    values: dict[str, float]
    cite: str

    @property
    def label(self) -> str:
        """The arm, marked."""
        return f"{self.arm} (quoted: {self.cite})"


def read_quoted(path: Path) -> list[Quoted]:
    """Return the rows of a YAML list of ``{arm, kept, values, cite}``.

    Raises:
        TaskError: for a missing or broken file, or a row that lacks one of the four or has another type there.
    """
    if not path.is_file():
        raise TaskError(f"{path} does not exist; give a YAML list of quoted rows: arm, kept, values, cite")
    records = read_yaml(path, TaskError)
    if not isinstance(records, list) or not records:
        raise TaskError(f"{path} must hold a list of quoted rows: arm, kept, values, cite; it holds {shown(records)}")
    return [_row(record, f"{path}, row {number}") for number, record in enumerate(records, start=1)]


def _row(record: Any, where: str) -> Quoted:
    # Without its source a number from a paper could be taken for a measured one.
    if not isinstance(record, dict) or set(record) != set(FIELDS):
        raise TaskError(f"{where}: a quoted row has exactly arm, kept, values and cite, got {shown(record)}")
    values = record["values"]
    for name in ("arm", "cite"):
        if not isinstance(record[name], str):
            raise TaskError(f"{where}: {name} is text, got {shown(record[name])}")
    if not _is_number(record["kept"]):
        raise TaskError(f"{where}: kept is a number of visual tokens, got {shown(record['kept'])}")
    if not isinstance(values, dict) or not all(isinstance(column, str) for column in values):
        raise TaskError(f"{where}: values are numbers by column, such as {{overall: 61.9}}, got {shown(values)}")
    for column, value in values.items():
        if not _is_number(value):
            raise TaskError(f"{where}: the value of {column} is a number, got {shown(value)}")
    return Quoted(**record)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
