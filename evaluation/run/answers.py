"""Questions with what several arms keep of the picture and what they answer, drawn as one figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.records import Result
from prunetune.evaluation.report.plot import Shown, answers_figure
from prunetune.evaluation.run.panels import Panels, ShownArm, panels, read_answers
from prunetune.evaluation.tasks import Item, get_task
from prunetune.evaluation.tasks.base import task_folder
from prunetune.outputs import ANSWERS, OutputFolder


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
    answered = read_answers(arms, task)
    wrong = _first_wrong(answered[wrong_in], items, count)
    if not wrong:
        raise TaskError(f"{arms[wrong_in].folder} answers everything, so there is no wrong answer to show")
    rows = [_row(shown) for shown in panels(arms, answered, wrong, questions.open_images())]
    with OutputFolder(output, ANSWERS, overwrite=True) as folder, folder.staged(whole=True) as new:
        answers_figure(rows, new / "answers.png")
    return output / "answers.png"


def _row(shown: Panels) -> tuple[str, str, np.ndarray, tuple[int, int], list[Shown]]:
    """Return a row of the figure."""
    drawn = []
    for panel in shown.arms:
        drawn.append(Shown(panel.arm.label, panel.positions, panel.result.prediction, bool(panel.result.score)))
    return shown.item.question, str(shown.item.answer), shown.pixels, shown.arms[0].grid, drawn


def _first_wrong(rows: dict[str, Result], items: dict[str, Item], count: int) -> list[Item]:
    """Return the first questions that are answered wrongly, one of a picture."""
    found: dict[str, Item] = {}
    for name, item in items.items():
        row = rows.get(name)
        if row is not None and row.score == 0 and item.image is not None:
            found.setdefault(item.image, item)
    return list(found.values())[:count]
