"""The sealed record of an analysis: what was looked at, by what, and the hash of every file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import read_json
from prunetune.models.seal import why_unsealed

RECORD = "analysis.json"
FORMAT = 1


def read_analysis(folder: Path) -> dict[str, Any]:
    """Return the record of an analysis.

    Raises:
        TaskError: if it is missing, another version's, or was edited.
    """
    path = folder / RECORD
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise TaskError(f"{path} is no record of an analysis that this version reads; analyse again")
    wrong = why_unsealed(values)
    if wrong is not None:
        raise TaskError(f"{path} can't be trusted: {wrong}; analyse again")
    return values
