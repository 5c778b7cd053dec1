"""``comparison.json``: which arms a table was made of, so that ``prunetune verify`` can say whether it still is."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import file_hash, read_json
from prunetune.evaluation.records import MANIFEST, read_manifest
from prunetune.evaluation.report.arms import EvaluatedArm
from prunetune.evaluation.report.comparable import allowed_differences, check_allowed
from prunetune.evaluation.report.tables.table import Table
from prunetune.models.code import code_record
from prunetune.models.record import portable
from prunetune.models.seal import sealed, why_unsealed
from prunetune.outputs import write_text

COMPARISON = "comparison.json"
TABLE = "table.json"
LAYOUTS = ("markdown", "csv", "latex", "json")
"""In which a comparison's table is written."""
FORMAT = 2
"""Of comparison.json: one with another table is another format."""


def write_comparison(
    output: Path,
    tables: Sequence[Path],
    runs: Sequence[Path],
    hard_for: Path | None = None,
    allow: Sequence[str] = (),
    rescore: bool = False,
    final: Path | None = None,
) -> None:
    """Write which arms the tables in a folder are of, and how they were compared, with the hashes of all.

    Args:
        output: folder that holds the tables.
        tables: files in it.
        runs: the arms' folders.
        hard_for: the arm of the difficulty filter.
        allow: fields that may differ between the arms.
        rescore: whether the arms were scored anew.
        final: where the folder will be moved to, if it is not there yet.
    """
    place = final or output
    allowed = check_allowed(allow)
    values = {
        "format": FORMAT,
        "arms": [_arm(place, run) for run in runs],
        "hard_for": None if hard_for is None else _arm(place, hard_for),
        "allow": allowed,
        "differences": _differences(place, runs, allowed),
        "rescore": rescore,
        "tables": {path.name: file_hash(path) for path in tables},
        "prunetune": code_record(),
    }
    write_text(output / COMPARISON, json.dumps(sealed(values), indent=2) + "\n")


def read_comparison(folder: Path) -> dict[str, Any]:
    """Return a comparison's record; raises TaskError if it is missing, broken or was edited."""
    path = folder / COMPARISON
    if not path.is_file():
        raise TaskError(f"{path} is missing; compare the arms again with this version")
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise TaskError(f"{path} is no comparison of this version; compare the arms again")
    wrong = why_unsealed(values)
    if wrong is not None:
        raise TaskError(f"{path} can't be trusted: {wrong}; compare the arms again")
    return values


def read_table(folder: Path) -> Table:
    """Return a comparison's table; raises TaskError if it is missing or none of this version."""
    path = folder / TABLE
    if not path.is_file():
        raise TaskError(f"{path} is missing; compare the arms again with this version")
    values = read_json(path)
    try:
        return Table.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = f"{path} is no table of this version: {where}: {first['msg']}"
        raise TaskError(f"{what}; compare the arms again") from None


def _differences(output: Path, runs: Sequence[Path], allowed: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return how the arms differ in what may: the folders of each value, by field."""
    arms = [EvaluatedArm(Path(run), read_manifest(run), {}, []) for run in runs]
    found: dict[str, dict[str, list[str]]] = {}
    for name, values in allowed_differences(arms, allowed).items():
        own = found.setdefault(name, {})
        for value, folders in values.items():
            own.setdefault(portable(value) or "", []).extend(os.path.relpath(run, output) for run in folders)
    return found


def _arm(output: Path, run: Path) -> dict[str, str]:
    """Return an arm's folder as seen from the comparison's, so that both may move together, and its manifest's hash."""
    return {"folder": os.path.relpath(run, output), "manifest": file_hash(Path(run) / MANIFEST)}
