"""What of a table can't be, all of it, before anything starts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

from prunetune.errors import PrunetuneError
from prunetune.evaluation.report.comparable import check_allowed
from prunetune.evaluation.report.quoted import read_quoted
from prunetune.evaluation.tasks import get_task
from prunetune.evaluation.tasks.base import task_folder
from prunetune.models.blueprint import unfit
from prunetune.scripts.tables.cells import Model, Plan
from prunetune.scripts.tables.state import is_trained
from prunetune.train.preflight import check_before_launch


def impossible(plan: Plan) -> list[str]:
    """Return every row, benchmark and training of a table that can't work, with the reason, a line each.

    No weight is read: a method that a tower can't serve and a budget above its tokens show on the model's shape.
    """
    found = [*plan.impossible, *_of_options(plan)]
    videos = []
    for name in plan.config.tasks:
        try:
            task = get_task(name)
            if task.video:
                videos.append(name)
            task.open(task_folder(plan.config.data, name))
        except PrunetuneError as error:
            found.append(f"benchmark {name}: {error}")
    for model in plan.models:
        found += _of_model(plan, model, videos)
    return [*found, *_of_trainings(plan, found)]


def _of_options(plan: Plan) -> Iterator[str]:
    for what, read in (("allow", lambda: check_allowed(plan.config.allow)), ("quoted", lambda: _quoted(plan))):
        try:
            read()
        except PrunetuneError as error:
            yield f"{what}: {error}"


def _of_trainings(plan: Plan, told: Sequence[str]) -> Iterator[str]:
    for training in plan.trainings:
        if is_trained(training):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the libraries' about one another
                check_before_launch(training.config)
        except PrunetuneError as error:
            if not any(str(error) in line for line in told):  # the row's own line says it
                yield f"training {training.name}: {error}"


def _quoted(plan: Plan) -> None:
    for name in plan.config.quoted:
        read_quoted(name)


def _of_model(plan: Plan, model: Model, videos: list[str]) -> Iterator[str]:
    specs = plan.specs(model)
    try:
        family, errors = unfit(model.config, specs)
    except PrunetuneError as error:
        yield f"model {model.name}: {error}"
        return
    for spec, why in zip(specs, errors, strict=True):
        if why is not None:
            rows = [arm.row for arm in plan.arms if arm.model is model and arm.spec == spec]
            yield f"{model.name}, {', '.join(dict.fromkeys(rows))}: {why}"
    if videos and "video" not in family.pixels:
        yield f"{model.name}: {', '.join(videos)} ask about videos, which model family {family.name!r} does not take"
