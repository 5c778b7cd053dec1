"""The sealed record of an analysis: what was looked at, by what, and the hash of every file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.models.seal import read_sealed

RECORD = "analysis.json"
FORMAT = 1


def read_analysis(folder: Path) -> dict[str, Any]:
    """Return the record of an analysis.

    Raises:
        TaskError: if it is missing, another version's, or was edited.
    """
    return read_sealed(folder / RECORD, "analysis", "analyse again", TaskError, format=FORMAT)
