"""The whole story on the bundled tiny VLM, in minutes on a CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from prunetune.configs import (
    ConfigError,
    EvaluateConfig,
    RecalibrateConfig,
    TrackingConfig,
    load_config,
)
from prunetune.data_recipes import load_recipe
from prunetune.evaluation.report.arms import read_arm
from prunetune.evaluation.report.tables.layouts.markdown import to_markdown
from prunetune.evaluation.report.tables.table import Row, Table
from prunetune.evaluation.run.answers import ShownArm, show_answers
from prunetune.evaluation.run.features import feature_data
from prunetune.models import Arm
from prunetune.models.features import FeatureData, make_features
from prunetune.models.ranks import join_ranks
from prunetune.outputs import DEMO, FEATURES, OutputFolder
from prunetune.pruning import PruningSpec
from prunetune.screen import libraries_in, say
from prunetune.scripts.caching import stored_before_training
from prunetune.scripts.launch import LOG, launch_several
from prunetune.scripts.tracked import tracked_compare, tracked_evaluate
from prunetune.train.elastic import settings_of

METHODS = ("fastervlm", "vispruner", "prismprune", "divprune")
BUDGETS = (36, 16)
KEEP = 16
"""Visual tokens that are tuned for."""


@dataclass(frozen=True)
class World:
    """What the demo is about.

    Attributes:
        one: the configuration of a recalibration for one pruner and budget.
        many: of one for all of them.
        task: the benchmark.
        format: of the recipe.
        questions: about each scene.
    """

    one: str
    many: str
    task: str
    format: str
    questions: int


TINY = World("recalibrate/tiny_divprune_16", "recalibrate/tiny_elastic", "tiny_world", "shapes_world", 8)
HARD = World(
    "recalibrate/tiny_hard_divprune_16", "recalibrate/tiny_hard_elastic", "hard_world", "hard_shapes_world", 10
)
RECIPE = "recipe.yaml"
"""In the demo's folder: what projectors are recalibrated on."""
SUMMARY = "summary.md"
PROJECTORS = {
    "tuned projector": "tuned for this row",
    "elastic projector": "one elastic projector",
    "projector tuned without pruning": "control: tuned without pruning",
}
"""Labels of tuned arms, and what the summary calls them."""
CONTROL = "dense_control"
ELASTIC = "elastic"


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        scenes: test scenes that each arm answers questions about.
        trained: scenes that projectors are recalibrated on.
        steps: updates of a recalibration for one method.
        elastic: updates of the one for all of them.
        control: updates of the one without pruning.
        methods: which are tuned one by one.
    """

    scenes: int
    trained: int
    steps: int
    elastic: int
    control: int
    methods: tuple[str, ...] = METHODS


FULL = Size(scenes=150, trained=750, steps=100, elastic=200, control=100)
LONGER = Size(scenes=150, trained=1_500, steps=200, elastic=400, control=100)
"""Of the harder world."""
QUICK = Size(scenes=50, trained=400, steps=60, elastic=80, control=10, methods=("divprune",))
BATCH = 32
"""Questions of an update on each of the two ranks."""
TERMS = "{gce: 1.0}"
"""What the elastic one is trained towards here: without the teacher of its configuration, which doubles its cost."""


def run_demo(output: Path, quick: bool = False, overwrite: bool = False, hard: bool = False) -> None:
    """Dense, four methods, each recalibrated, one projector for all of them, a control, and the table.

    Args:
        output: folder of everything that is written; an older demo there is replaced, anything else is left alone.
        quick: fewer test scenes and updates, and one method recalibrated instead of four.
        overwrite: use a folder that holds other files as well.
        hard: in the harder world, which takes longer.

    Raises:
        OutputError: if the folder holds something else than a demo, is in use, or can't be written.
        ConfigError: if a recalibration fails.
    """
    began = time.monotonic()
    with OutputFolder(output, DEMO, overwrite) as folder:
        folder.clear()
        with libraries_in(output / "libraries.log"):
            size = LONGER if hard else FULL
            _run(folder, HARD if hard else TINY, QUICK if quick else size, began)


def _run(folder: OutputFolder, world: World, size: Size, began: float) -> None:
    output = folder.path
    one, many = load_config(RecalibrateConfig, world.one), load_config(RecalibrateConfig, world.many)
    dense = Arm.load(one.model, device="cpu")  # the one model of every arm below

    say("\n== 1/5  the vision tower, once over all pictures")
    specs = [PruningSpec(method, keep) for method in METHODS for keep in BUDGETS]
    specs += [setting.spec for setting in settings_of(many.pruning, many.elastic)]
    stored, _ = stored_before_training(dense, specs)
    recipe = output / RECIPE
    folder.write_text(RECIPE, _recipe(world, size.trained))
    _features(output / "features" / "train", dense, stored, FeatureData.of_recipe(load_recipe(str(recipe))))
    questions = feature_data([world.task], None, world.questions * size.scenes, one.data.max_pixels, None)
    _features(output / "features" / "test", dense, stored, questions)

    say("\n== 2/5  dense and training-free")
    arms: list[Path] = []

    def measure(name: str, arm: Arm) -> None:
        arms.append(_evaluate(output, world, name, arm, size))

    measure("dense", dense)
    for keep in BUDGETS:
        for method in METHODS:
            measure(f"{method}_{keep}", dense.with_pruning(PruningSpec(method, keep)))

    say(f"\n== 3/5  recalibrate the projector, DeepSpeed on 2 CPU ranks: {', '.join(size.methods)} at {KEEP} tokens,")
    say("        one for all methods and budgets, and one without pruning as a control")
    _recalibrate(folder, world, size)

    say("\n== 4/5  tuned")
    for method in METHODS:
        arm = dense.with_pruning(PruningSpec(method, KEEP))
        if method in size.methods:
            measure(f"{method}_{KEEP}_tuned", arm.with_adapter(_adapter(output, method)))
        measure(f"{method}_{KEEP}_elastic", arm.with_adapter(_adapter(output, ELASTIC)))
        measure(f"{method}_{KEEP}_control", arm.with_adapter(_adapter(output, CONTROL)))
    measure("dense_elastic", dense.with_adapter(_adapter(output, ELASTIC)))

    say("\n== 5/5  compare")
    table = tracked_compare(arms, output / "comparison", TrackingConfig(wandb="offline", name="demo"), overwrite=True)
    print(to_markdown(table))
    folder.write_text(SUMMARY, summary(table))
    print(summary(table))
    _show(output, world, dense)
    print(f"{time.monotonic() - began:.0f} s in all.")
    print(
        f"tables       {output / 'comparison' / 'table.md'}, {output / SUMMARY}\n"
        f"plot         {output / 'comparison' / 'plot.png'}\n"
        f"answers      {output / 'answers' / 'answers.png'}\nadapters     {output / 'recalibrate'}\n"
        f"W&B offline  {output / 'recalibrate' / ELASTIC / 'wandb'}"
    )


def _features(place: Path, dense: Arm, specs: list[PruningSpec], data: FeatureData) -> None:
    with OutputFolder(place, FEATURES, overwrite=True) as folder:  # whose it is was settled with the demo's
        make_features(folder, dense, [*specs, PruningSpec()], data, join_ranks(), batch_size=32)


def _evaluate(output: Path, world: World, name: str, arm: Arm, size: Size) -> Path:
    config = EvaluateConfig(
        model=arm.base.config,
        pruning=arm.spec,
        adapter=arm.adapter,
        tasks=[world.task],
        limit=world.questions * size.scenes,
        batch_size=160,
        max_new_tokens=6,
        features=str(output / "features" / "test"),
        output=str(output / "arms" / name),
        overwrite=True,
    )
    folder = tracked_evaluate(config, arm)
    reached = read_arm(folder)
    say(f"{name:<22} {reached.average().overall:.1f} % right at {reached.kept:g} of 144 tokens")
    return folder


def _recalibrate(folder: OutputFolder, world: World, size: Size) -> None:
    """Recalibrate for each method, for all of them, and without pruning, in one launch."""
    runs = []
    for method in size.methods:
        pruning = ["--pruning.pruner", method, "--pruning.keep", str(KEEP)]
        runs.append(_arguments(folder.path, method, world.one, size.steps, *pruning))
    runs.append(_arguments(folder.path, ELASTIC, world.many, size.elastic, "--objective.terms", TERMS))
    pruning = ["--pruning.pruner", "identity", "--pruning.keep", "100%"]
    runs.append(_arguments(folder.path, CONTROL, world.one, size.control, *pruning))
    status = launch_several(2, runs, folder)
    if status != 0:
        log = folder.path / LOG
        raise ConfigError(f"a recalibration ended with status {status}; what it said is above and in {log}")


def _recipe(world: World, scenes: int) -> str:
    return f"name: {world.task}_demo\nformat: {world.format}\nsplit: recalibration\nscenes: {scenes}\n"


def _arguments(output: Path, name: str, config: str, steps: int, *more: str) -> list[str]:
    return [
        *("--config", config, "--output", str(output / "recalibrate" / name)),
        *("--data.recipe", str(output / RECIPE), "--features", str(output / "features" / "train")),
        *("--train.max_steps", str(steps), "--train.save_steps", str(steps), "--train.batch_size", str(BATCH)),
        *more,
    ]


def _adapter(output: Path, name: str) -> Path:
    return output / "recalibrate" / name / "adapter"


def _show(output: Path, world: World, dense: Arm) -> None:
    """Draw what is asked, what stays of the picture, and what is answered before and after."""
    arm = dense.with_pruning(PruningSpec("divprune", KEEP))
    shown = [ShownArm("dense", dense, output / "arms" / "dense")]
    for label, name in (("training-free", ""), ("tuned", "_tuned"), ("elastic", "_elastic")):
        adapter = {"": None, "_tuned": _adapter(output, "divprune"), "_elastic": _adapter(output, ELASTIC)}[name]
        folder = output / "arms" / f"divprune_{KEEP}{name}"
        shown.append(ShownArm(f"divprune {KEEP}, {label}", arm.with_adapter(adapter), folder))
    show_answers(shown, world.task, wrong_in=1, count=4, output=output / "answers")


def summary(table: Table) -> str:
    """Return a Markdown table with a row for each method at the tuned budget, and a column for each projector."""
    names = {row.label: row for row in table.rows if row.kept == KEEP or row.label.startswith("dense")}
    (column,) = table.columns  # the demo has one benchmark, which has one metric
    lines = [["", "base's projector", *PROJECTORS.values()], ["---", *["---:"] * (1 + len(PROJECTORS))]]
    for method in (*METHODS, "dense"):
        told = "no pruning, 144 tokens" if method == "dense" else f"{method}, {KEEP} tokens"
        cells = [_reached(names[method], column.key)]
        for label in PROJECTORS:
            row = names.get(f"{method} + {label}")
            cells.append("" if row is None else _gained(row, column.key))
        lines.append([told, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _reached(row: Row, key: str) -> str:
    value = row.values[key]
    assert value.interval is not None  # every question has a score
    return f"{value.value:.1f} [{value.interval[0]:.1f}, {value.interval[1]:.1f}]"


def _gained(row: Row, key: str) -> str:
    gain = row.gains[key]
    assert gain.interval is not None  # every tuned row has its training-free one
    low, high = gain.interval
    return f"{row.values[key].value:.1f} (**{gain.value:+.1f}** [{low:+.1f}, {high:+.1f}])"
