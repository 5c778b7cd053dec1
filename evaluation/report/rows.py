"""Whether an arm's rows are what was evaluated: of the manifest's questions, and with the scores that they get."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.records import RESULTS, Manifest, Result, results_hash
from prunetune.evaluation.tasks.base import Benchmark, Item, Scored, get_task, items_hash
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
    scored_again(folder, manifest, rows)


def scored_again(
    folder: Path, manifest: Manifest, rows: Sequence[Result], rescore: bool = False
) -> tuple[dict[str, list[Scored]], dict[str, int]]:
    """Score the predictions once more.

    Args:
        folder: the arm's, for messages.
        manifest: the arm's.
        rows: the arm's.
        rescore: whether the scorers of today count where they say something else than when the arm was evaluated.

    Returns:
        The answers with their scores, by benchmark, and how many of each benchmark have another score than is stored.

    Raises:
        TaskError: naming the first row whose score is another, unless that is what was asked for, or a benchmark that
            is not loaded here.
    """
    tasks = {name: _task(folder, manifest, name) for name in manifest.tasks}
    scored: dict[str, list[Scored]] = {name: [] for name in tasks}
    changed: dict[str, int] = {}
    for row in rows:
        one = Scored(row.prediction, item_of(row), row.score)
        if row.score is not None or rescore:
            again = tasks[row.task].score(row.prediction, one.item)
            if not _same(again.score, row.score):
                if not rescore:
                    raise TaskError(_edited(folder, row, again.score))
                one = again
                changed[row.task] = changed.get(row.task, 0) + 1
        scored[row.task].append(one)
    return scored, changed


def _same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, abs_tol=1e-9)


def _edited(folder: Path, row: Result, score: float | None) -> str:
    return (
        f"{folder / RESULTS}: row {row.id!r} of {row.task} has score {row.score:g}, its prediction {row.prediction!r} "
        f"gets {'none' if score is None else f'{score:g}'}; the file was edited, or the scorer is another: evaluate "
        "again, or take today's scores with --rescore"
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
