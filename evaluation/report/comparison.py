"""``comparison.json``: which arms a table was made of, so that ``prunetune verify`` can say whether it still is."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import file_hash, read_json
from prunetune.evaluation.records import MANIFEST, read_manifest
from prunetune.evaluation.report.arms import EvaluatedArm
from prunetune.evaluation.report.comparable import allowed_differences, check_allowed
from prunetune.evaluation.report.places import without_folders
from prunetune.evaluation.report.quoted import papers, read_all, source_file
from prunetune.evaluation.report.tables.arms import ArmRuns, parts_of
from prunetune.evaluation.report.tables.assemble import assemble
from prunetune.evaluation.report.tables.table import Table
from prunetune.models.code import code_record
from prunetune.models.record import portable
from prunetune.models.seal import read_sealed, sealed
from prunetune.outputs import write_text

COMPARISON = "comparison.json"
TABLE = "table.json"
LAYOUTS = ("markdown", "csv", "latex", "json")
"""In which a comparison's table is written."""
FORMAT = 2
"""Of comparison.json: one with another table is another format."""


@dataclass(frozen=True)
class Recipe:
    """What a table was assembled from, where the folders of its arms alone don't say it.

    Attributes:
        runs: a row each.
        title: of the table.
        baseline: the arms of the ``downsample`` baseline.
        quoted: sources of quoted rows, see :func:`~prunetune.evaluation.report.quoted.read_quoted`.
        allow: fields that may differ between arms.
        rescore: whether the arms are scored anew.
        several_models: whether they may be of several.
        notes: further footnotes.
        also: further columns of its Markdown and LaTeX.
    """

    runs: Sequence[ArmRuns]
    title: str = ""
    baseline: Sequence[ArmRuns] = ()
    quoted: Sequence[str | Path] = ()
    allow: Sequence[str] = ()
    rescore: bool = False
    several_models: bool = False
    notes: Sequence[str] = ()
    also: Sequence[str] = ()

    def table(self, output: Path) -> Table:
        """Return the table that lies, or will lie, in ``output``.

        Raises:
            TaskError: see :func:`~prunetune.evaluation.report.tables.assemble.assemble`.
        """
        return assemble(
            self.runs,
            title=self.title,
            baseline=list(self.baseline),
            quoted=read_all(self.quoted),
            allow=self.allow,
            rescore=self.rescore,
            several_models=self.several_models,
            output=output,
            notes=self.notes,
        )

    def folders(self) -> list[Path]:
        """Return the folder of every evaluation."""
        return [folder for run in (*self.runs, *self.baseline) for parts in parts_of(run) for folder in parts]


def write_recipe(output: Path, tables: Sequence[Path], recipe: Recipe, final: Path | None = None) -> None:
    """Write what the tables in a folder were assembled from, like :func:`write_comparison`.

    Args:
        output: folder that holds the tables.
        tables: files in it.
        recipe: what they were assembled from.
        final: where the folder will be moved to, if it is not there yet.
    """
    place = final or output
    values = {
        "title": recipe.title,
        "rows": [_row(place, run) for run in recipe.runs],
        "baseline": [_row(place, run) for run in recipe.baseline],
        "quoted": [_source(place, source) for source in recipe.quoted],
        "several_models": recipe.several_models,
        "notes": [without_folders(note, place) for note in recipe.notes],
        "also": list(recipe.also),
    }
    _write(output, tables, recipe.folders(), None, recipe.allow, recipe.rescore, final, {"recipe": values})


def read_recipe(folder: Path, values: dict[str, Any]) -> Recipe | None:
    """Return what a folder's table was assembled from; None of a comparison, whose arms say it.

    Sources of quoted rows that are not here, or say something else by now, are left out.
    """
    own = values.get("recipe")
    if own is None:
        return None
    quoted = []
    for record in own["quoted"]:
        source = record["source"] if record["source"] in papers() else folder / record["source"]
        file = source_file(source)
        if file.is_file() and file_hash(file) == record["sha256"]:
            quoted.append(source)
    return Recipe(
        runs=[_run(folder, row) for row in own["rows"]],
        title=own["title"],
        baseline=[_run(folder, row) for row in own["baseline"]],
        quoted=quoted,
        allow=values["allow"],
        rescore=values["rescore"],
        several_models=own["several_models"],
        notes=own["notes"],
        also=own["also"],
    )


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
    _write(output, tables, runs, hard_for, allow, rescore, final, {})


def _write(
    output: Path,
    tables: Sequence[Path],
    runs: Sequence[Path],
    hard_for: Path | None,
    allow: Sequence[str],
    rescore: bool,
    final: Path | None,
    more: dict[str, Any],
) -> None:
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
        **more,
    }
    write_text(output / COMPARISON, json.dumps(sealed(values), indent=2) + "\n")


def read_comparison(folder: Path) -> dict[str, Any]:
    """Return a comparison's record; raises TaskError if it is missing, broken or was edited."""
    return read_sealed(folder / COMPARISON, "comparison", "compare the arms again", TaskError, format=FORMAT)


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


def _row(output: Path, run: ArmRuns) -> dict[str, Any]:
    folders = [[os.path.relpath(folder, output) for folder in parts] for parts in parts_of(run)]
    return {"label": run.label, "model": run.model, "method": run.method, "folders": folders}


def _run(folder: Path, row: dict[str, Any]) -> ArmRuns:
    places = [[folder / part for part in parts] for parts in row["folders"]]
    return ArmRuns(row["label"], places, row["model"], row["method"])


def _source(output: Path, source: str | Path) -> dict[str, str]:
    """Return a source of quoted rows: a paper by its name, a file as seen from the table's folder; and its hash."""
    file = source_file(source)
    name = str(source) if str(source) in papers() else os.path.relpath(file, output)
    return {"source": name, "sha256": file_hash(file)}


def _arm(output: Path, run: Path) -> dict[str, str]:
    """Return an arm's folder as seen from the comparison's, so that both may move together, and its manifest's hash."""
    return {"folder": os.path.relpath(run, output), "manifest": file_hash(Path(run) / MANIFEST)}
