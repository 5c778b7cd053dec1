"""An arm's files: results.jsonl in item order, its manifest, and the shards that several ranks write meanwhile."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError

RESULTS, MANIFEST = "results.jsonl", "manifest.json"
Batches = dict[str, list[list[str]]]
"""For each task the ids of its items, in their fixed batches."""


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return an arm's rows."""
    return [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return an arm's manifest; raises TaskError if the folder is no finished arm."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise TaskError(f"{folder} is no evaluated arm: {MANIFEST} is missing; run prunetune evaluate first")
    manifest = json.loads(path.read_text())
    if not manifest.get("complete"):
        raise TaskError(f"the arm in {folder} is not finished; run the same prunetune evaluate again, it goes on")
    return manifest


def shard(output: Path, rank: int, ranks: int) -> Path:
    """Return the file that a rank appends to: results.jsonl itself where there is only one."""
    return output / (RESULTS if ranks == 1 else f"results.rank{rank}.jsonl")


def start(output: Path, manifest: dict[str, Any]) -> None:
    """Begin an arm in a folder, or check that the folder holds the same arm.

    Raises:
        TaskError: if it holds another one, naming the fields that differ.
    """
    path = output / MANIFEST
    if not path.exists():
        for old in _files(output):
            old.unlink()
        write_json(path, manifest)
        return
    old = json.loads(path.read_text())
    changed = [key for key, value in manifest.items() if key != "complete" and old.get(key) != value]
    if changed:
        raise TaskError(
            f"{output} holds an arm that differs in {', '.join(changed)}; choose another output folder or "
            "delete this one"
        )


def gather(output: Path, batches: Batches) -> set[tuple[str, str]]:
    """Write the rows of all whole batches to results.jsonl, in order, and return their (task, id) pairs.

    Shards of an earlier run, with as many ranks as it may have had, are taken in and removed; a batch or a line that
    was being written when a run was killed is cut off.
    """
    rows = {(row["task"], row["id"]): row for file in _files(output) for row in _whole_lines(file)}
    kept = []
    for task, groups in batches.items():
        for ids in groups:
            if all((task, number) in rows for number in ids):
                kept += [rows[task, number] for number in ids]
    results = output / RESULTS
    partial = results.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(partial, results)
    for file in _files(output):
        if file != results:
            file.unlink()
    return {(row["task"], row["id"]) for row in kept}


def _files(output: Path) -> list[Path]:
    return sorted(path for path in output.glob("results*.jsonl"))


def _whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # the line that was being written
            return


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file that is there whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)
