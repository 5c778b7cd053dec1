"""Rows quoted from papers: shown beside measured ones, marked, and never part of a computation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from prunetune.evaluation.errors import TaskError

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
        TaskError: for a missing file or a row that lacks one of the four.
    """
    if not path.is_file():
        raise TaskError(f"{path} does not exist; give a YAML list of quoted rows: arm, kept, values, cite")
    rows = []
    for number, record in enumerate(yaml.safe_load(path.read_text()) or [], start=1):
        # Without its source a number from a paper could be taken for a measured one.
        if not isinstance(record, dict) or set(record) != set(FIELDS):
            raise TaskError(
                f"{path}, row {number}: a quoted row has exactly arm, kept, values and cite, got {record!r}"
            )
        rows.append(Quoted(**record))
    return rows
