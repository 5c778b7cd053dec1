"""Where a task's items and pictures come from: its published files, or the lmms-lab layout where that is there."""

from __future__ import annotations

from pathlib import Path

from data_recipes.images import ImageOpener
from evaluation import lmms_lab
from evaluation.errors import TaskError
from evaluation.tasks.base import Item, Task


def read_items(task: Task, data: Path, answers_only: bool = False) -> list[Item]:
    """Return a task's items; with ``answers_only`` from fewer files, where the task can."""
    if lmms_lab.is_lmms_lab(task.name, data):
        return lmms_lab.read_items(task.name, data)
    try:
        return (task.answers if answers_only and task.answers else task.read)(data)
    except KeyError as error:  # a record of a file that is not what it is called
        raise TaskError(
            f"a record of {task.name}'s files in {data} has no {error}; are they the published ones?"
        ) from None


def open_images(task: Task, data: Path) -> ImageOpener:
    """Return a task's pictures."""
    return lmms_lab.open_images(data) if lmms_lab.is_lmms_lab(task.name, data) else task.images(data)
