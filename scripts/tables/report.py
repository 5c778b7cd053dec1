"""What is written of a filled table: its layouts, the report with examples, and what it was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prunetune.configs import ConfigError
from prunetune.errors import PrunetuneError
from prunetune.evaluation.records import read_manifest
from prunetune.evaluation.report.comparison import write_comparison
from prunetune.evaluation.report.plot import plot_table
from prunetune.evaluation.report.quoted import read_quoted
from prunetune.evaluation.report.tables.arms import ArmRuns
from prunetune.evaluation.report.tables.assemble import assemble
from prunetune.evaluation.report.tables.layouts.examples import Examples
from prunetune.evaluation.report.tables.layouts.files import write_layouts
from prunetune.evaluation.report.tables.layouts.html.report import write_report
from prunetune.evaluation.report.tables.layouts.markdown import to_markdown
from prunetune.evaluation.report.tables.table import Row, Table, Value
from prunetune.evaluation.tasks import get_task
from prunetune.outputs import OutputFolder
from prunetune.screen import say
from prunetune.scripts.profiling.columns import footnote, measured_columns
from prunetune.scripts.profiling.record import PROFILE, read_costs
from prunetune.scripts.tables.cells import ARMS, HARD, Model, Plan, TableArm
from prunetune.scripts.tables.cost import Questions, Sizes, sizes_of, tera_flops
from prunetune.train.tracking import Tracker

REPORT, PLOT = "report.html", "plot.png"


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
    runs = [ArmRuns("", [_folders(plan, arm) for arm in group]) for group in groups]
    table = assemble(
        runs,
        title=plan.config.title,
        baseline=[_folders(plan, arm) for arm in plan.arms if arm.row == HARD and not _broken(plan, arm, failed)],
        quoted=[quote for name in plan.config.quoted for quote in read_quoted(name)],
        allow=plan.config.allow,
        several_models=len(plan.models) > 1,
        output=plan.output,
        notes=notes,
    )
    table = _with_costs(plan, table, groups, questions)
    table = _with_profile(plan, table, groups)
    examples = _examples(plan, table, groups) if "html" in plan.config.layouts else None
    _write(plan, table, groups, examples, folder)
    _track(plan, table, examples)
    print(to_markdown(table))
    say(f"table: {plan.output}")
    return table


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
    return [arms for key, arms in rows.items() if key not in lacking], list(lacking.values())


def _is_twin(one: TableArm, other: TableArm) -> bool:
    return one.training is None and one.spec.model_copy(update={"choose_with": "tuned"}) == other.spec.model_copy(
        update={"choose_with": "tuned"}
    )


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


def _with_costs(
    plan: Plan, table: Table, groups: Sequence[Sequence[TableArm]], questions: Mapping[str, Questions]
) -> Table:
    """Return the table with what a question costs, computed from the model's shape, and a footnote that says so."""
    sizes = sizes_of(plan)
    costs: dict[str, dict[str, Value]] = {}
    for group in groups:
        found = _cost(group[0], sizes.get(group[0].model.slug), questions)
        if found is not None:
            costs[_row_of(plan, table, group[0]).id] = {"TFLOPs": Value(value=found)}
    if not costs:
        return table
    rows = [row.model_copy(update={"costs": {**row.costs, **costs.get(row.id, {})}}) for row in table.rows]
    note = (
        "TFLOPs: of the tower over an image and the LLM's prefill of a question, mean over all questions; computed "
        "from the model's shape, text tokens estimated, two operations for a multiplication and an addition."
    )
    return table.model_copy(update={"rows": rows, "footnotes": [*table.footnotes, note]})


def _with_profile(plan: Plan, table: Table, groups: Sequence[Sequence[TableArm]]) -> Table:
    """Return the table with what `prunetune profile` measured of its arms, if it did."""
    file = plan.output / PROFILE
    if not file.is_file():
        return table
    try:
        measured = read_costs(file)
    except ConfigError as error:
        say(f"not in the table: {error}")
        return table
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
    if len(lacking) == len(groups):
        return table
    notes = [*table.footnotes, footnote(measured)]
    return table.model_copy(update={"rows": list(rows.values()), "footnotes": notes})


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
    tasks = [name for name in plan.config.tasks if not get_task(name).video and get_task(name).scorer is not None]
    parts = []
    for model in plan.models:
        own = [group[0] for group in groups if group[0].model is model]
        for task in tasks:
            part = _examples_of(plan, table, model, own, task, max(1, plan.config.examples // len(tasks)))
            if part is not None:
                parts.append(part)
    return Examples.joined(parts) if parts else None


def _examples_of(
    plan: Plan, table: Table, model: Model, arms: Sequence[TableArm], task: str, count: int
) -> Examples | None:
    from prunetune.evaluation.run.examples import collect_examples
    from prunetune.evaluation.run.panels import ShownArm
    from prunetune.models import Arm

    base = Arm.load(model.config)
    shown = []
    for arm in arms:
        adapter = None if arm.training is None else str(arm.training.adapter)
        row = _row_of(plan, table, arm)
        folder = plan.output / ARMS / arm.name / task
        shown.append(ShownArm(row.label, base.with_pruning(arm.spec).with_adapter(adapter), folder, row.id))
    ids = {one.id for one in shown}
    pairs = [(row.twin, row.id) for row in table.rows if row.twin in ids and row.id in ids]
    try:
        return collect_examples(shown, task, plan.config.data, count, [(str(one), other) for one, other in pairs])
    except PrunetuneError as error:  # a set has one score, say, or the tokens form no grid
        say(f"no examples of {model.name} on {task}: {error}")
        return None


def _write(
    plan: Plan, table: Table, groups: Sequence[Sequence[TableArm]], examples: Examples | None, folder: OutputFolder
) -> None:
    with folder.staged() as new:
        # Its JSON is what `prunetune verify` reads, so it is written whatever the YAML says.
        layouts = dict.fromkeys([*(name for name in plan.config.layouts if name != "html"), "json"])
        files = write_layouts(table, new, list(layouts))
        if "html" in plan.config.layouts:
            write_report(table, examples, new / REPORT)
        plot_table(table, new / PLOT)
        cells = [cell for group in groups for arm in group for cell in _folders(plan, arm)]
        write_comparison(new, files, cells, allow=plan.config.allow, final=plan.output)


def _track(plan: Plan, table: Table, examples: Examples | None) -> None:
    """Send the table, its plot, the report and the examples to W&B, in the group of its arms and trainings."""
    import base64
    import csv

    from prunetune.evaluation.report.tables.layouts.csv import to_csv
    from prunetune.scripts.tables.cells import tracked

    if plan.config.tracking.wandb == "off":
        return
    tracking = tracked(plan.config, "table", plan.config.title)
    tracker = Tracker(tracking, plan.output, plan.config.model_dump())
    header, *body = csv.reader(to_csv(table.model_copy(update={"quoted": []})).splitlines())
    tracker.log_table("table", header, body)
    tracker.log_image("plot", plan.output / PLOT)
    if "html" in plan.config.layouts:
        tracker.log_report("report", plan.output / REPORT)
    if examples is not None:
        rows = []
        for example in examples.examples:
            for name, answered in example.arms.items():
                picture = base64.b64decode(example.picture.data)
                rows.append([picture, example.task, example.question, example.answer, name, answered.prediction])
        tracker.log_pictures("examples", ["picture", "task", "question", "answer", "arm", "prediction"], rows)
    tracker.close()
