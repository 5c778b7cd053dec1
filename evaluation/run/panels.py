"""What several arms keep of a picture and what they answered, as data: for a figure and for a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prunetune.data_recipes.images import ImageOpener
from prunetune.evaluation.records import Result, read_results
from prunetune.evaluation.run.features import sample_of
from prunetune.evaluation.run.visualize import kept_view
from prunetune.evaluation.tasks import Item
from prunetune.models import Arm


@dataclass(frozen=True)
class ShownArm:
    """An arm whose answers are shown.

    Attributes:
        label: above its column.
        arm: to see what it keeps.
        folder: of its finished evaluation, to read what it answered.
        id: of its row in a table; empty where there is none.
    """

    label: str
    arm: Arm
    folder: Path
    id: str = ""


@dataclass(frozen=True)
class Panel:
    """What an arm keeps of a picture, and what it answered.

    Attributes:
        arm: whose.
        positions: the kept ones in raster order.
        grid: rows and columns of the patches.
        result: its row of results.jsonl.
    """

    arm: ShownArm
    positions: np.ndarray
    grid: tuple[int, int]
    result: Result


@dataclass(frozen=True)
class Panels:
    """A question with the panels of all arms.

    Attributes:
        item: the question.
        pixels: the picture as the vision tower saw it (H, W, 3), 8 bits.
        arms: in the order of the arms.
    """

    item: Item
    pixels: np.ndarray
    arms: list[Panel]


Answers = Sequence[dict[str, Result]]
"""Of each arm its rows by the item's id."""


def read_answers(arms: Iterable[ShownArm], task: str) -> Answers:
    """Return what the arms answered to a benchmark; raises TaskError for an evaluation that can't be read."""
    return [{row.id: row for row in read_results(own.folder) if row.task == task} for own in arms]


def panels(arms: Sequence[ShownArm], answers: Answers, items: Iterable[Item], images: ImageOpener) -> Iterator[Panels]:
    """Give for each question what the arms keep of its picture, and what they answered.

    Args:
        arms: of one model.
        answers: see :func:`read_answers`.
        items: questions with a picture that all arms answered.
        images: opens the pictures.

    Raises:
        TaskError: if the visual tokens of the model form no grid.
    """
    for item in items:
        found, pixels = [], None
        for own, rows in zip(arms, answers, strict=True):
            positions, grid, picture = kept_view(own.arm, images, sample_of(item))
            found.append(Panel(own, positions, grid, rows[item.id]))
            pixels = np.asarray(picture.convert("RGB"))  # the same for all: they are arms of one model
        assert pixels is not None  # there is at least one arm
        yield Panels(item, pixels, found)
