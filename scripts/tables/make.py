"""From one YAML to the table: check, plan, train what is missing, encode, evaluate, put together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from prunetune.configs import ConfigError, TableConfig, to_yaml
from prunetune.errors import PrunetuneError
from prunetune.evaluation.records import read_results
from prunetune.evaluation.report.rows import item_of
from prunetune.evaluation.tasks import get_task
from prunetune.evaluation.tasks.base import Scored
from prunetune.outputs import TABLE, OutputFolder
from prunetune.screen import libraries_in, say
from prunetune.scripts.tables.cells import Cell, Plan, Training, lay_out
from prunetune.scripts.tables.check import impossible
from prunetune.scripts.tables.cost import Questions, plan_text, questions_of
from prunetune.scripts.tables.engines import Engine, engine_of
from prunetune.scripts.tables.live import Progress, shown
from prunetune.scripts.tables.report import write_table
from prunetune.scripts.tables.state import is_evaluated, is_trained
from prunetune.scripts.tables.train import train_missing
from prunetune.scripts.tables.work import Job, Outcome
from prunetune.train.gpus import Gpu


@dataclass(frozen=True)
class Finished:
    """How a table ended.

    Attributes:
        failed: what did not come about, by cell, with the reason.
        status: of a signal that ended it; 0 if none did.
    """

    failed: dict[str, str]
    status: int = 0


def make_table(config: TableConfig, dry_run: bool = False, gpu: Gpu | None = None, gpus: int = 1) -> Finished:
    """Fill a table and write it; what is there already and is what the YAML asks for is not made again.

    Args:
        config: the YAML.
        dry_run: say what it consists of and what it will cost, and stop.
        gpu: what times are planned for.
        gpus: how many.

    Raises:
        ConfigError: with every row, benchmark and training that can't work, before anything starts.
        OutputError: if the folder is in use, holds something else, or can't be written.
    """
    plan = lay_out(config)
    refuse_impossible(plan)
    questions = questions_of(plan)
    say(plan_text(plan, questions, gpu, gpus))
    if dry_run:
        return Finished({})
    with OutputFolder(config.output, TABLE, config.overwrite) as folder, libraries_in(plan.output / "libraries.log"):
        folder.write_text("config.yaml", to_yaml(config.model_copy(update={"overwrite": False})))
        ended = _fill(plan, questions, folder)
        if ended.status == 0:  # by now the model that cells ran with is free: the report's examples load it again
            write_table(plan, questions, ended.failed, folder)
        return ended


def refuse_impossible(plan: Plan) -> None:
    """Raise ConfigError with all that can't be, if there is anything."""
    found = impossible(plan)
    if found:
        lines = "\n".join(f"  {line}" for line in found)
        raise ConfigError(f"{len(found)} part{'s' * (len(found) > 1)} of this table can't be made:\n{lines}")


def _fill(plan: Plan, questions: dict[str, Questions], folder: OutputFolder) -> Finished:
    """Train, encode and evaluate what is missing."""
    engine = engine_of(plan.config)
    failed: dict[str, str] = {}

    trained, status = _train(plan, engine, folder)
    if status != 0:
        return Finished({}, status)
    for cell in plan.cells:
        if cell.arm.training is not None and cell.arm.training.name in trained:
            failed[cell.name] = trained[cell.arm.training.name]

    progress = Progress(plan, {task: own.items for task, own in questions.items()}, failed=failed)
    for cell in plan.cells:
        if is_evaluated(cell):
            progress.done[cell.name] = headline(cell)
    console = Console(file=sys.stderr)
    with shown(progress, console):
        broken = _encode(plan, engine, progress)
        for cell in _todo(plan, progress):
            if cell.config.features is not None and features_of(cell) in broken:
                failed[cell.name] = broken[features_of(cell)]
        _evaluate(plan, engine, progress, quiet=console.is_terminal)
    progress.look()
    say(progress.line())
    for name, why in failed.items():
        say(f"failed: {name}: {why}")
    return Finished(failed)


def _train(plan: Plan, engine: Engine, folder: OutputFolder) -> tuple[dict[str, str], int]:
    """Train what is missing; return why trainings failed, and a signal's exit status."""
    todo = [training for training in plan.trainings if not is_trained(training)]
    if not todo:
        return {}, 0
    failed: dict[str, str] = {}
    if plan.config.training_features:
        caches = {training.name: _cache_of(training) for training in todo}
        broken = _run(engine, [("training_features", name) for name in sorted(set(caches.values()))], _say_outcome)
        failed = {name: broken[cache] for name, cache in caches.items() if cache in broken}
        todo = [training for training in todo if training.name not in failed]
    if plan.config.workers.engine == "local":
        say(f"training {len(todo)} projector{'s' * (len(todo) > 1)}")
        others, status = train_missing(plan.config, todo, folder)
        return {**failed, **others}, status
    jobs: dict[int | None, list[Job]] = {}
    for training in todo:
        jobs.setdefault(training.config.devices, []).append(("training", training.name))
    for devices, alike in jobs.items():
        failed |= _run(engine, alike, _say_outcome, devices)
    return failed, 0


def _encode(plan: Plan, engine: Engine, progress: Progress) -> dict[str, str]:
    """Encode the images of all benchmarks once a model; return why that failed, by model and benchmark."""
    wanted = {features_of(cell) for cell in _todo(plan, progress) if cell.config.features is not None}
    return _run(engine, [("features", name) for name in sorted(wanted)], _say_outcome)


def _evaluate(plan: Plan, engine: Engine, progress: Progress, quiet: bool) -> None:
    """Evaluate every cell that is missing; those that fail are told, and the others go on."""
    cells = {cell.name: cell for cell in _todo(plan, progress)}

    def note(outcome: Outcome) -> None:
        name = outcome.job[1]
        if outcome.error is None:
            progress.done[name] = headline(cells[name])
        else:
            progress.failed[name] = outcome.error
        if not quiet or outcome.error is not None:
            told = progress.done.get(name) or f"failed: {outcome.error}"
            say(f"{name}: {told} ({outcome.seconds:.0f} s)")

    _run(engine, [("cell", name) for name in cells], note)


def features_of(cell: Cell) -> str:
    """Return the name of the job that makes a cell's features."""
    return f"{cell.arm.model.slug}/{cell.task}"


def _cache_of(training: Training) -> str:
    return f"{training.name.partition('/')[0]}/{Path(str(training.config.features)).name}"


def _todo(plan: Plan, progress: Progress) -> list[Cell]:
    return [cell for cell in plan.cells if cell.name not in progress.done and cell.name not in progress.failed]


def _run(engine: Engine, jobs: list[Job], note: Callable[[Outcome], None], devices: int | None = 1) -> dict[str, str]:
    """Run jobs and tell of each as it ends; return why some failed, by their names."""
    failed = {}
    if jobs:
        for outcome in engine.run(jobs, devices):
            note(outcome)
            if outcome.error is not None:
                failed[outcome.job[1]] = outcome.error
    return failed


def _say_outcome(outcome: Outcome) -> None:
    kind, name = outcome.job
    told = "done" if outcome.error is None else f"failed: {outcome.error}"
    say(f"{kind.replace('_', ' ')} of {name}: {told} ({outcome.seconds:.0f} s)")


def headline(cell: Cell) -> str:
    """Return a finished cell's headline number, as the live table shows it."""
    try:
        scorer = get_task(cell.task).scorer
        if scorer is None or not scorer.metrics:
            return "done"
        scored = [Scored(row.prediction, item_of(row), row.score) for row in read_results(cell.folder)]
        value = scorer.metrics[0].of(scored)
        return "done" if value is None else f"{value:.1f}"
    except PrunetuneError:
        return "done"
