"""The sealed record of a visualization: what was drawn, by what, and the hash of every file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import read_json
from prunetune.models.seal import why_unsealed

RECORD = "kept.json"
FORMAT = 1


def read_drawn(folder: Path) -> dict[str, Any]:
    """Return the record of a visualization.

    Raises:
        TaskError: if it is missing, another version's, or was edited.
    """
    path = folder / RECORD
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise TaskError(f"{path} is no record of a visualization that this version reads; draw again")
    wrong = why_unsealed(values)
    if wrong is not None:
        raise TaskError(f"{path} can't be trusted: {wrong}; draw again")
    return values
