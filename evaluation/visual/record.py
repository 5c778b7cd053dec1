"""The sealed record of a visualization: what was drawn, by what, and the hash of every file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.models.seal import read_sealed

RECORD = "kept.json"
FORMAT = 1


def read_drawn(folder: Path) -> dict[str, Any]:
    """Return the record of a visualization.

    Raises:
        TaskError: if it is missing, another version's, or was edited.
    """
    return read_sealed(folder / RECORD, "visualization", "draw again", TaskError, format=FORMAT)
