"""Whether an arm's rows are what was evaluated: of the manifest's questions, and with the scores that they get."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.records import RESULTS, Manifest, Result, results_hash
from prunetune.evaluation.tasks.base import Benchmark, Item, get_task, items_hash
from prunetune.models.seal import short


def check_rows(folder: Path, manifest: Manifest, rows: Sequence[Result]) -> None:
    """Check that the rows are of the questions that the manifest names, in their order.

    Raises:
        TaskError: naming the benchmark whose rows are not.
    """
    for name, task in manifest.tasks.items():
        items = [item_of(row) for row in rows if row.task == name]
        if len(items) != task.items or items_hash(items) != task.hash:
            raise TaskError(
                f"{folder / RESULTS}: the questions of {name} are not those of the manifest, or in different order "
                f"(hash {short(items_hash(items))}, expected {short(task.hash)}); the file was edited, evaluate again"
            )


def check_scores(folder: Path, manifest: Manifest, rows: Sequence[Result]) -> None:
    """Score the predictions once more and check that every row's score is the one that its prediction gets.

    Raises:
        TaskError: naming the first row whose score is another, or a benchmark that is not loaded here.
    """
    tasks = {name: _task(folder, manifest, name) for name in manifest.tasks}
    for row in rows:
        if row.score is None:
            continue
        own = tasks[row.task].score(row.prediction, item_of(row)).score
        if own is None or not math.isclose(own, row.score, abs_tol=1e-9):
            raise TaskError(
                f"{folder / RESULTS}: row {row.id!r} of {row.task} has score {row.score:g}, its prediction "
                f"{row.prediction!r} gets {'none' if own is None else f'{own:g}'}; the file was edited, or the scorer "
                "is another: evaluate again"
            )


def check_results_hash(folder: Path, manifest: Manifest) -> None:
    """Check that results.jsonl is as it was written; raises TaskError with both hashes if not."""
    if manifest.results_hash is None:  # of a version before the seals
        return
    found = results_hash(folder)
    if found != manifest.results_hash:
        raise TaskError(
            f"{folder / RESULTS} was changed after it was written: its hash is {short(found)}, the manifest says "
            f"{short(manifest.results_hash)}; evaluate the arm again into another folder"
        )


def item_of(row: Result) -> Item:
    """Return the question that a row answers."""
    return Item(row.id, row.source, row.image, row.question, row.answer, row.kinds)


def _task(folder: Path, manifest: Manifest, name: str) -> Benchmark:
    try:
        return get_task(name)
    except TaskError as error:
        # Which of them brings the benchmark the manifest does not say; most arms have one or none.
        names = [plugin.name for plugin in manifest.plugins]
        if not names:
            raise TaskError(f"{folder}: its scores can't be checked: {error}") from None
        options = " ".join(f"--plugins {plugin}" for plugin in names)
        raise TaskError(
            f"{folder}: its scores can't be checked, since {name!r} is not loaded here; the arm ran with plug-ins, "
            f"load them: {options}"
        ) from None
