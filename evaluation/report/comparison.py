"""``comparison.json``: which arms a table was made of, so that ``prunetune verify`` can say whether it still is."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import file_hash, read_json
from prunetune.evaluation.records import MANIFEST
from prunetune.models.code import code_record
from prunetune.models.seal import sealed, why_unsealed
from prunetune.outputs import write_text

COMPARISON = "comparison.json"
TABLES = ("table.md", "table.csv")


def write_comparison(
    output: Path, runs: Sequence[Path], hard_for: Path | None = None, final: Path | None = None
) -> None:
    """Write which arms the tables in a folder are of, with the hashes of all.

    Args:
        output: folder that holds the tables.
        runs: the arms' folders.
        hard_for: the arm of the difficulty filter.
        final: where the folder will be moved to, if it is not there yet.
    """
    place = final or output
    arms = [_arm(place, run) for run in runs]
    values = {
        "format": 1,
        "arms": arms,
        "hard_for": None if hard_for is None else _arm(place, hard_for),
        "tables": {name: file_hash(output / name) for name in TABLES},
        "prunetune": code_record(),
    }
    write_text(output / COMPARISON, json.dumps(sealed(values), indent=2) + "\n")


def read_comparison(folder: Path) -> dict[str, Any]:
    """Return a comparison's record; raises TaskError if it is missing, broken or was edited."""
    path = folder / COMPARISON
    if not path.is_file():
        raise TaskError(f"{path} is missing; compare the arms again with this version")
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != 1:
        raise TaskError(f"{path} is no comparison of this version; compare the arms again")
    wrong = why_unsealed(values)
    if wrong is not None:
        raise TaskError(f"{path} can't be trusted: {wrong}; compare the arms again")
    return values


def _arm(output: Path, run: Path) -> dict[str, str]:
    """Return an arm's folder as seen from the comparison's, so that both may move together, and its manifest's hash."""
    return {"folder": os.path.relpath(run, output), "manifest": file_hash(Path(run) / MANIFEST)}
