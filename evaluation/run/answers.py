"""Questions with what several arms keep of the picture and what they answer, drawn as one figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.records import Result, read_results
from prunetune.evaluation.report.plot import Shown, answers_figure
from prunetune.evaluation.run.features import sample_of
from prunetune.evaluation.run.visualize import base_view, seen_image
from prunetune.evaluation.tasks import Item, get_task
from prunetune.evaluation.tasks.base import task_folder
from prunetune.models import Arm
from prunetune.outputs import ANSWERS, OutputFolder


@dataclass(frozen=True)
class ShownArm:
    """An arm in the figure.

    Attributes:
        label: above its column.
        arm: to draw what it keeps.
        folder: of its finished evaluation, to read what it answered.
    """

    label: str
    arm: Arm
    folder: Path


def show_answers(
    arms: list[ShownArm], task: str, wrong_in: int, count: int, output: Path, data: str | None = None
) -> Path:
    """Write ``answers.png``: a row for each of some questions, a column for each arm.

    Nobody picks the questions: they are the first ones, of a picture each, that one arm answers wrongly, whatever the
    others answer.

    Args:
        arms: of one model and one task, whose evaluations are finished.
        task: the benchmark.
        wrong_in: the number of the arm whose wrong answers are shown.
        count: how many questions.
        output: folder of the figure.
        data: folder of the benchmark's files, see EvaluateConfig.

    Raises:
        OutputError: if the folder holds something else, or can't be written.
        TaskError: if that arm answers everything, or the visual tokens of the model form no grid.
    """
    questions = get_task(task).open(task_folder(data, task))
    items = {item.id: item for item in questions.items}
    answered = [{row.id: row for row in read_results(own.folder) if row.task == task} for own in arms]
    wrong = _first_wrong(answered[wrong_in], items, count)
    if not wrong:
        raise TaskError(f"{arms[wrong_in].folder} answers everything, so there is no wrong answer to show")
    images = questions.open_images()
    rows = []
    for item in wrong:
        panels, pixels, grid = [], None, None
        for own, results in zip(arms, answered, strict=True):
            inputs = own.arm.place(own.arm.formatter(images).prompt_batch([sample_of(item)]))
            with torch.inference_mode():
                positions, grid = base_view(own.arm.pruned.prepare(inputs).chosen["image"])
            row = results[item.id]
            panels.append(Shown(own.label, positions, row.prediction, bool(row.score)))
            pixels = seen_image(inputs["pixel_values"][0], own.arm, images, sample_of(item))
        assert pixels is not None and grid is not None  # there is at least one arm
        rows.append((item.question, str(item.answer), np.asarray(pixels), grid, panels))
    with OutputFolder(output, ANSWERS, overwrite=True) as folder, folder.staged(whole=True) as new:
        answers_figure(rows, new / "answers.png")
    return output / "answers.png"


def _first_wrong(rows: dict[str, Result], items: dict[str, Item], count: int) -> list[Item]:
    """Return the first questions that are answered wrongly, one of a picture."""
    found: dict[str, Item] = {}
    for name, item in items.items():
        row = rows.get(name)
        if row is not None and row.score == 0 and item.image is not None:
            found.setdefault(item.image, item)
    return list(found.values())[:count]
