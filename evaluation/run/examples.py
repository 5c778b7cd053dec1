"""Questions on which arms differ, with what they keep of the picture, for the HTML report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.report.tables.layouts.examples import Answered, Example, Examples, Picture
from prunetune.evaluation.run.panels import Panel, Panels, ShownArm, panels, read_answers
from prunetune.evaluation.tasks import Item, get_task
from prunetune.evaluation.tasks.base import task_folder


def collect_examples(
    arms: Sequence[ShownArm],
    task: str,
    data: str | None = None,
    count: int = 24,
    pairs: Sequence[tuple[str, str]] = (),
) -> Examples:
    """Return questions that one arm answers rightly and another wrongly.

    Nobody picks them: each pair of arms in turn gives the first question that its second arm gains, and the first that
    it loses, until there are ``count``; no picture is shown twice. There are fewer where the arms do not differ.

    Args:
        arms: of one model, with the ids of their rows, whose evaluations of the task are finished.
        task: a benchmark about images that scores its items one by one.
        data: folder of the benchmark's files, see EvaluateConfig.
        count: how many at most.
        pairs: ids of a training-free arm and of one tuned from it; none compares the first arm with all others.

    Raises:
        TaskError: if the task is about videos or scores no item by itself, an arm has not answered it, a pair names an
            arm that is not among them, or the visual tokens of the model form no grid.
    """
    if get_task(task).video:
        raise TaskError(f"{task} is about videos, and kept tokens are drawn over images; choose a task about images")
    ids = [own.id for own in arms]
    for name in (name for pair in pairs for name in pair):
        if name not in ids:
            raise TaskError(f"no arm of these has the id {name!r}; there are {', '.join(ids)}")
    questions = get_task(task).open(task_folder(data, task))
    answers = read_answers(arms, task)
    for own, rows in zip(arms, answers, strict=True):
        if not any(row.score is not None for row in rows.values()):
            raise TaskError(f"{own.folder} holds no answer to {task} that has a score; choose a task that it answered")
    by_id = dict(zip(ids, answers, strict=True))
    compared = list(pairs) or [(ids[0], name) for name in ids[1:]]
    chosen = _in_turn([queue for pair in compared for queue in _flips(questions.items, by_id, pair)], count)
    how = (
        f"From {task}: each pair of arms in turn gives the first question that is gained and the first that is lost, "
        "of a picture each."
    )
    shown = panels(arms, answers, chosen, questions.open_images())
    return Examples(how=how, examples=[_example(task, one) for one in shown])


def _flips(items: Sequence[Item], answers: dict[str, Any], pair: tuple[str, str]) -> tuple[list[Item], list[Item]]:
    """Return the questions that the second arm of a pair gains, and those that it loses."""
    before, after = (answers[name] for name in pair)
    gained: list[Item] = []
    lost: list[Item] = []
    for item in items:
        # Answered by all: what is shown has a panel of each arm.
        scores = [rows[item.id].score if item.id in rows else None for rows in answers.values()]
        if item.image is None or None in scores:
            continue
        difference = after[item.id].score - before[item.id].score
        if difference > 0:
            gained.append(item)
        elif difference < 0:
            lost.append(item)
    return gained, lost


def _in_turn(queues: Sequence[Sequence[Item]], count: int) -> list[Item]:
    """Return items of all queues in turn, one of a picture."""
    found: dict[str, Item] = {}
    for item in _dealt(queues):
        if len(found) < count:
            found.setdefault(str(item.image), item)
    return list(found.values())


def _dealt(queues: Sequence[Sequence[Item]]) -> Iterator[Item]:
    for round_ in zip_longest(*queues):
        yield from (item for item in round_ if item is not None)


def _example(task: str, shown: Panels) -> Example:
    item = shown.item
    return Example(
        task=task,
        id=item.id,
        question=item.question,
        answer=told_answer(item.answer),
        picture=Picture.of(shown.pixels),
        arms={panel.arm.id: _answered(panel) for panel in shown.arms},
    )


def _answered(panel: Panel) -> Answered:
    score = panel.result.score
    assert score is not None  # questions without one are not chosen
    return Answered(
        prediction=panel.result.prediction,
        score=min(max(score, 0), 1),
        kept=panel.positions.tolist(),
        grid=panel.grid,
    )


def told_answer(answer: Any) -> str:
    """Return the right answer, or several, as a reader wants it: those of ten people each once, the commonest first."""
    if isinstance(answer, str):
        return answer
    if isinstance(answer, list) and all(isinstance(one, str) for one in answer):
        return ", ".join(sorted(dict.fromkeys(answer), key=lambda one: -answer.count(one)))
    return json.dumps(answer, ensure_ascii=False)
