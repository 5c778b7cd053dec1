"""Where a task's items and pictures come from: its published files, or the lmms-lab layout where only that is there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from prunetune.data_recipes.images import ImageOpener
from prunetune.data_recipes.parquet import NAMED, ROW
from prunetune.evaluation import lmms_lab
from prunetune.evaluation.errors import MissingFile, TaskError
from prunetune.evaluation.tasks.base import Item, Task


def read_items(task: Task, data: Path, answers_only: bool = False) -> list[Item]:
    """Return a task's items; with ``answers_only`` from fewer files, where the task can.

    Raises:
        TaskError: for missing or foreign files, or an id that is there twice.
    """
    try:
        items = (task.answers if answers_only and task.answers else task.read)(data)
    except MissingFile:
        if not lmms_lab.is_lmms_lab(task.name, data):
            raise
        items = lmms_lab.read_items(task.name, data)
    except KeyError as error:  # a record of a file that is not what it is called
        raise TaskError(
            f"a record of {task.name}'s files in {data} has no {error}; are they the published ones?"
        ) from None
    number, times = Counter(item.id for item in items).most_common(1)[0] if items else ("", 0)
    if times > 1:
        raise TaskError(f"{task.name}: question {number!r} is in the files in {data} {times} times")
    return items


def open_images(task: Task, data: Path, items: list[Item]) -> ImageOpener:
    """Return a task's pictures, for the items that :func:`read_items` gave."""
    references = (item.image for item in items if item.image is not None)
    if task.name in lmms_lab.ROWS and next(references, "").startswith((ROW, NAMED)):
        return lmms_lab.open_images(data)
    return task.images(data)
