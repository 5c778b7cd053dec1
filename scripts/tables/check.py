"""What of a table can't be, all of it, before anything starts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

from prunetune.errors import PrunetuneError
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.report.comparable import check_allowed
from prunetune.evaluation.report.quoted import check_names, known_metrics, plain_model, read_quoted
from prunetune.evaluation.tasks import get_task
from prunetune.evaluation.tasks.base import task_folder
from prunetune.models.blueprint import unfit
from prunetune.scripts.tables.cells import Model, Plan
from prunetune.scripts.tables.state import is_of_other_settings, is_trained, is_trained_otherwise
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
    found += _of_trainings(plan, found)
    return found or list(_of_other_settings(plan))


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


def _of_other_settings(plan: Plan) -> Iterator[str]:
    """Yield what an earlier table left in the output folder that this one would have to delete."""
    if plan.config.remake or plan.config.overwrite:
        return
    trainings = [training.name for training in plan.trainings if is_trained_otherwise(training)]
    # Cells of a projector that is trained anew are of other settings as well, and are not named again.
    cells = [cell.name for cell in plan.cells if is_of_other_settings(cell)]
    for what, names in (("trainings", trainings), ("cells", cells)):
        if names:
            yield (
                f"{plan.output} holds {len(names)} {what} of other settings, or changed since (first {names[0]}); give "
                "--remake true to delete them and make them anew, or another output"
            )


def _quoted(plan: Plan) -> None:
    methods = {arm.label for arm in plan.arms} | {arm.spec.method for arm in plan.arms}
    models = {plain_model(name) for model in plan.models for name in (model.name, model.config.path)}
    for name in plan.config.quoted:
        quotes = read_quoted(name)
        check_names(quotes, known_metrics(), methods)
        own = [quote for quote in quotes if not quote.model or plain_model(quote.model) in models]
        if not any(key.partition("/")[0] in plan.config.tasks for quote in own for key in quote.values):
            raise TaskError(f"{name} has no row of a model and a benchmark of this table; leave it out")


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
