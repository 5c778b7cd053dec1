"""What is written of a filled table: its layouts, the report with examples, and what it was made of."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from prunetune.configs import ConfigError
from prunetune.errors import PrunetuneError
from prunetune.evaluation.records import read_manifest
from prunetune.evaluation.report.comparable import unchosen
from prunetune.evaluation.report.comparison import Recipe, write_recipe
from prunetune.evaluation.report.plot import plot_table
from prunetune.evaluation.report.tables.arms import ArmRuns
from prunetune.evaluation.report.tables.layouts.examples import Answered, Examples, Picture
from prunetune.evaluation.report.tables.layouts.files import write_layouts
from prunetune.evaluation.report.tables.layouts.html.report import write_report
from prunetune.evaluation.report.tables.layouts.markdown import to_markdown
from prunetune.evaluation.report.tables.table import Row, Table, Value
from prunetune.evaluation.tasks import get_task
from prunetune.outputs import OutputFolder
from prunetune.reading import one_line
from prunetune.screen import say
from prunetune.scripts.profiling.columns import footnote, measured_columns
from prunetune.scripts.profiling.record import PROFILE, Costs, read_costs
from prunetune.scripts.tables.cells import ARMS, HARD, Model, Plan, TableArm, tracked
from prunetune.scripts.tables.cost import Questions, Sizes, sizes_of, tera_flops
from prunetune.scripts.tracked import send_table
from prunetune.train.tracking import Tracker

REPORT, PLOT = "report.html", "plot.png"
ON_COSTS = (
    "TFLOPs: of the tower over an image and the LLM's prefill of a question, mean over all questions; computed "
    "from the model's shape, text tokens estimated, two operations for a multiplication and an addition."
)
"""Footnote of a table with costs."""


def write_table(
    plan: Plan, questions: Mapping[str, Questions], failed: Mapping[str, str], folder: OutputFolder
) -> Table | None:
    """Write all layouts of what there is, and print the table; None if there is nothing to be compared.

    Raises:
        TaskError: if arms can't stand in one table, see :func:`~prunetune.evaluation.report.tables.assemble.assemble`.
    """
    groups, notes = _whole_rows(plan, failed)
    if not groups:
        say("no row of the table is complete, so nothing is written")
        return None
    runs = [_runs(plan, group) for group in groups]
    models = [group[0].model for group in groups]
    hard = [arm for arm in plan.arms if arm.row == HARD and arm.model in models and not _broken(plan, arm, failed)]
    costs = _costs(plan, groups, questions)
    measured = _measured(plan)
    recipe = Recipe(
        runs,
        title=plan.config.title,
        baseline=[ArmRuns("", [_folders(plan, arm)], arm.model.name) for arm in hard],
        quoted=plan.config.quoted,
        allow=_allowed(plan),
        rescore=plan.config.rescore,
        several_models=len(plan.models) > 1,
        notes=[
            *notes,
            *([ON_COSTS] if any(cost is not None for cost in costs) else []),
            *([footnote(measured)] if measured is not None else []),
        ],
    )
    table = _with_costs(plan, recipe.table(plan.output), groups, costs)
    if measured is not None:
        table = _with_profile(plan, table, groups, measured)
    # Of a toy's they would be zeros: two digits stand behind the point.
    counted = [row.costs["TFLOPs"].value or 0.0 for row in table.rows if "TFLOPs" in row.costs]
    also = ["TFLOPs"] if max(counted, default=0.0) >= 0.01 else []
    _write(plan, table, recipe, also, folder)
    print(to_markdown(table, also))
    examples = None
    if "html" in plan.config.layouts:
        # Last, since it needs the models: what was evaluated in days is written by now.
        examples = _examples(plan, table, groups)
        with folder.staged() as new:
            write_report(table, examples, new / REPORT)
    _track(plan, table, examples)
    say(f"table: {plan.output}")
    return table


def _allowed(plan: Plan) -> list[str]:
    """Return the fields in which arms may differ: a table that grew has cells that read another feature cache."""
    return sorted({*plan.config.allow, "features"})


def _runs(plan: Plan, group: Sequence[TableArm]) -> ArmRuns:
    """Return a row by the names that the YAML has for its model and its method."""
    arm = group[0]
    # A method without a name of its own is called by its pruner, with the options that are set.
    method = "" if arm.label in (arm.spec.method, "dense") else arm.label
    return ArmRuns("", [_folders(plan, one) for one in group], arm.model.name, method)


def _whole_rows(plan: Plan, failed: Mapping[str, str]) -> tuple[list[list[TableArm]], list[str]]:
    """Return the arms of each row that has all its cells, and a note on each that has not."""
    rows: dict[tuple[str, str], list[TableArm]] = {}
    for arm in plan.arms:
        if arm.row != HARD:
            rows.setdefault((arm.model.slug, arm.row), []).append(arm)
    lacking = {}
    for key, arms in rows.items():
        broken = [name for arm in arms for name in _broken(plan, arm, failed)]
        if broken:
            lacking[key] = f"Left out: {broken[0]} failed ({failed[broken[0]]})."
    for key, arms in rows.items():
        twin = next((other for other in rows if other[0] == key[0] and _is_twin(rows[other][0], arms[0])), None)
        if key not in lacking and arms[0].training is not None and (twin is None or twin in lacking):
            name = arms[0].name
            lacking[key] = f"Left out: {name}, whose training-free arm is not there to be compared with."
    notes = list(lacking.values())
    for arm in plan.arms:
        broken = _broken(plan, arm, failed) if arm.row == HARD else []
        if broken:
            notes.append(f"No hard part of {arm.model.name}: {broken[0]} failed ({failed[broken[0]]}).")
    return [arms for key, arms in rows.items() if key not in lacking], notes


def _is_twin(one: TableArm, other: TableArm) -> bool:
    return one.training is None and unchosen(one.spec) == unchosen(other.spec)


def _broken(plan: Plan, arm: TableArm, failed: Mapping[str, str]) -> list[str]:
    return [f"{arm.name}/{task}" for task in plan.config.tasks if f"{arm.name}/{task}" in failed]


def _folders(plan: Plan, arm: TableArm) -> list[Path]:
    return [plan.output / ARMS / arm.name / task for task in plan.config.tasks]


def _row_of(plan: Plan, table: Table, arm: TableArm) -> Row:
    """Return the row that an arm is in, by its folder."""
    own = (plan.output / ARMS / arm.name).resolve()
    for row in table.rows:
        for place in row.folders:
            folder = (plan.output / place).resolve()
            if own in (folder, folder.parent):
                return row
    raise AssertionError(f"{arm.name} is in no row")  # it was assembled from these folders


def _with_costs(plan: Plan, table: Table, groups: Sequence[Sequence[TableArm]], costs: Sequence[float | None]) -> Table:
    """Return the table with what a question costs in each row."""
    by_row: dict[str, dict[str, Value]] = {}
    for group, cost in zip(groups, costs, strict=True):
        if cost is not None:
            by_row[_row_of(plan, table, group[0]).id] = {"TFLOPs": Value(value=cost)}
    rows = [row.model_copy(update={"costs": {**row.costs, **by_row.get(row.id, {})}}) for row in table.rows]
    return table.model_copy(update={"rows": rows})


def _costs(plan: Plan, groups: Sequence[Sequence[TableArm]], questions: Mapping[str, Questions]) -> list[float | None]:
    """Return what a question costs in each row, computed from the model's shape; None where that can't be said."""
    sizes = sizes_of(plan)
    return [_cost(group[0], sizes.get(group[0].model.slug), questions) for group in groups]


def _measured(plan: Plan) -> Costs | None:
    """Return what `prunetune profile` measured of the table's arms; None if it did not."""
    file = plan.output / PROFILE
    if not file.is_file():
        return None
    try:
        return read_costs(file)
    except ConfigError as error:
        say(f"not in the table: {error}")
        return None


def _with_profile(plan: Plan, table: Table, groups: Sequence[Sequence[TableArm]], measured: Costs) -> Table:
    """Return the table with what was measured of its arms."""
    rows = {row.id: row for row in table.rows}
    lacking = []
    for group in groups:
        arm, row = group[0], _row_of(plan, table, group[0])
        frozen = read_manifest(_folders(plan, arm)[0]).frozen_hash
        found = measured_columns(measured, arm.model.config, frozen, arm.spec)
        if found is None:
            lacking.append(arm.name)
            continue
        rows[row.id] = row.model_copy(update={"costs": {**row.costs, **found}})
    if lacking:
        say(f"{PROFILE} has nothing of {', '.join(lacking)}: run `prunetune profile` again, their costs are left out")
    return table.model_copy(update={"rows": list(rows.values())})


def _cost(arm: TableArm, sizes: Sizes | None, questions: Mapping[str, Questions]) -> float | None:
    if sizes is None:
        return None
    total = items = 0.0
    for own in questions.values():
        try:
            total += own.items * tera_flops(arm.spec, sizes, own)
        except PrunetuneError:  # of images of several sizes the assumed one is too small for the budget
            return None
        items += own.items
    return total / items


def _examples(plan: Plan, table: Table, groups: Sequence[Sequence[TableArm]]) -> Examples | None:
    """Return flipped answers with what was kept, of every model and benchmark about images."""
    if plan.config.examples == 0:
        return None
    tasks = [name for name in plan.config.tasks if get_task(name).storable and get_task(name).scorer is not None]
    parts = []
    for model in plan.models:
        try:
            parts += _examples_of(plan, table, model, [group[0] for group in groups if group[0].model is model], tasks)
        except Exception as error:  # out of memory, say: the table stands without pictures
            say(f"no examples of {model.name}: {one_line(error)}")
    return Examples.joined(parts) if parts else None


def _examples_of(
    plan: Plan, table: Table, model: Model, arms: Sequence[TableArm], tasks: Sequence[str]
) -> list[Examples]:
    from prunetune.evaluation.run.examples import collect_examples
    from prunetune.evaluation.run.panels import ShownArm
    from prunetune.models import Arm

    base = Arm.load(model.config)
    loaded = []
    for arm in arms:
        adapter = None if arm.training is None else str(arm.training.adapter)
        loaded.append((arm, _row_of(plan, table, arm), base.with_pruning(arm.spec).with_adapter(adapter)))
    ids = {row.id for _, row, _ in loaded}
    pairs = [(str(row.twin), row.id) for row in table.rows if row.twin in ids and row.id in ids]
    count = max(1, plan.config.examples // max(1, len(tasks) * len(plan.models)))
    found = []
    for task in tasks:
        shown = [ShownArm(row.label, own, plan.output / ARMS / arm.name / task, row.id) for arm, row, own in loaded]
        try:
            found.append(collect_examples(shown, task, plan.config.data, count, pairs))
        except PrunetuneError as error:  # a set has one score, say, or the tokens form no grid
            say(f"no examples of {model.name} on {task}: {error}")
    return found


def _write(plan: Plan, table: Table, recipe: Recipe, also: Sequence[str], folder: OutputFolder) -> None:
    with folder.staged() as new:
        # Its JSON is what `prunetune verify` reads, so it is written whatever the YAML says.
        layouts = dict.fromkeys([*(name for name in plan.config.layouts if name != "html"), "json"])
        files = write_layouts(table, new, list(layouts), also)
        plot_table(table, new / PLOT)
        write_recipe(new, files, replace(recipe, also=also), final=plan.output)


def overlaid(picture: Picture, answered: Answered) -> bytes:
    """Return a picture as a PNG file, dark where an arm dropped it."""
    image = Image.open(io.BytesIO(base64.b64decode(picture.data))).convert("RGB")
    rows, columns = answered.grid
    kept = np.zeros(rows * columns, dtype=bool)
    kept[answered.kept] = True
    mask = Image.fromarray(kept.reshape(rows, columns)).resize(image.size, Image.Resampling.NEAREST)
    file = io.BytesIO()
    Image.composite(image, image.point(lambda value: value // 5), mask.convert("L")).save(file, "PNG")
    return file.getvalue()


def _track(plan: Plan, table: Table, examples: Examples | None) -> None:
    """Send the table, its plot, the report and the examples to W&B, in the group of its arms and trainings."""
    if plan.config.tracking.wandb == "off":
        return
    tracking = tracked(plan.config, "table", plan.config.title)
    tracker = Tracker(tracking, plan.output, plan.config.model_dump())
    send_table(tracker, "table", table, plan.output / PLOT)
    if "html" in plan.config.layouts:
        tracker.log_report("report", plan.output / REPORT)
    if examples is not None:
        rows = []
        for example in examples.examples:
            for name, answered in example.arms.items():
                told = [example.task, example.question, example.answer, name, answered.prediction]
                rows.append([overlaid(example.picture, answered), *told])
        tracker.log_pictures("examples", ["picture", "task", "question", "answer", "arm", "prediction"], rows)
    tracker.close()
