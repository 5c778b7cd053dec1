"""An arm's folder while it is being filled: one shard per rank, gathered into results.jsonl in the items' order."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.records import (
    MANIFEST,
    RESULTS,
    Manifest,
    Result,
    read_begun,
    result_of,
    write_manifest,
    write_results,
)

_SHARD = re.compile(r"results(\.rank[0-9]+)?\.jsonl")
Batches = dict[str, list[list[str]]]
"""For each task the ids of its items, in their fixed batches."""


def shard(output: Path, rank: int, ranks: int) -> Path:
    """Return the file that a rank appends to: results.jsonl itself where there is only one."""
    # A file for each: appends of two processes to one file may mix, over a network file system even within a line.
    return output / (RESULTS if ranks == 1 else f"results.rank{rank}.jsonl")


def start(output: Path, manifest: Manifest) -> None:
    """Begin an arm in a folder, or check that the folder holds the same arm.

    Raises:
        TaskError: if it holds another one, naming the fields that differ.
    """
    if not (output / MANIFEST).exists():
        # Rows without a manifest could be of any model; taken for this arm's, they would never be made again.
        for old in _files(output):
            old.unlink()
        write_manifest(output, manifest)
        return
    # Field by field, so that the message can say which: the two were made by the same command line more often than not.
    before = read_begun(output).settings()
    changed = []
    for key, value in manifest.settings().items():
        if before.get(key) != value:
            changed.append(key)
    if changed:
        raise TaskError(
            f"{output} holds an arm that differs in {', '.join(changed)}; choose another output folder, "
            "or set overwrite to start over"
        )


def gather(output: Path, batches: Batches) -> None:
    """Write the rows of all whole batches to results.jsonl, in order.

    Shards of an earlier run, with as many ranks as it may have had, are taken in and removed; a batch or a line that
    was being written when a run was killed is cut off.
    """
    # By task and id: killed between writing the whole file and removing the shards, a run leaves rows twice.
    rows: dict[tuple[str, str], Result] = {}
    for file in _files(output):
        for row in _whole_lines(file):
            rows[row.key] = row
    kept = []
    for task, groups in batches.items():
        for ids in groups:
            # Part of a batch is no use: in half precision an answer depends on the batch it was made in, so the rest
            # made alone could differ from what an uninterrupted run writes.
            if all((task, number) in rows for number in ids):
                kept += [rows[task, number] for number in ids]
    # First the whole file, then the shards away: killed in between, the next run finds every row twice, not never.
    write_results(output, kept)
    for file in _files(output):
        if file.name != RESULTS:
            file.unlink()


def _files(output: Path) -> list[Path]:
    # By their exact names: what somebody put beside them, results_backup.jsonl say, is neither read nor deleted.
    return sorted(file for file in output.glob("results*.jsonl") if _SHARD.fullmatch(file.name))


def _whole_lines(file: Path) -> Iterator[Result]:
    """Yield the rows of a file up to the one that was being written."""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record: Any = json.loads(line)
        # The line that was being written. Nothing follows it: the next run gathers before any of its ranks appends.
        except json.JSONDecodeError:
            return
        yield result_of(record, f"{file}, line {number}")
