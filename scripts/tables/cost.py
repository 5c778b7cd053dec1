"""What is missing of a table, and what it will cost, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunetune.errors import PrunetuneError
from prunetune.evaluation.tasks import Item, get_task
from prunetune.evaluation.tasks.base import task_folder
from prunetune.models.blueprint import model_without_weights
from prunetune.models.profile import resolved
from prunetune.pruning import PruningSpec
from prunetune.scripts.tables.cells import Cell, Plan, Training
from prunetune.scripts.tables.state import is_evaluated, is_trained
from prunetune.train.flops import flops_of, forward_of, image, layered
from prunetune.train.gpus import GPUS, Gpu
from prunetune.train.plan import MFU, columns, duration, make_plan
from prunetune.train.shape import ModelShape, shape_of
from prunetune.train.visual import Visual, visual_layers, visual_of
from prunetune.train.workload import IMAGE, TOKENS_AROUND, TOKENS_PER_WORD

EVALUATION_MFU = 0.2
"""Assumed share of the peak in evaluations, whose batches are small."""


@dataclass(frozen=True)
class Sizes:
    """What a model's cost depends on; an image is of the assumed size where the size matters."""

    shape: ModelShape
    visual: Visual
    model: Any

    def question(self, spec: PruningSpec, text: float) -> float:
        """Return the FLOP of the LLM's prefill for a question of so many text tokens about an image."""
        layers = visual_layers(self.model, spec, self.visual.kept(resolved(spec)))
        work = layered([[text + tokens] for tokens in layers])
        return forward_of(self.shape, work) + 2 * self.shape.language.head

    def encoding(self) -> float:
        """Return the FLOP of the tower over one image."""
        return flops_of(self.shape, image(self.visual.patches, self.visual.items)).tower


def sizes_of(plan: Plan) -> dict[str, Sizes]:
    """Return the sizes of each model, by slug; a model of which they can't be told is left out."""
    found = {}
    for model in plan.models:
        try:
            stock = model_without_weights(model.config.path, model.config.revision)
            found[model.slug] = Sizes(shape_of(stock), visual_of(stock, *IMAGE), stock)
        except PrunetuneError:
            continue
    return found


@dataclass(frozen=True)
class Questions:
    """A benchmark's questions: how many, about how many images, and their text tokens in the mean (estimated)."""

    items: int
    images: int
    text: float

    @classmethod
    def of(cls, items: list[Item]) -> Questions:
        """Return what some items ask for."""
        words = sum(len(item.question.split()) for item in items) / max(len(items), 1)
        images = len({item.image for item in items if item.image is not None})
        return cls(len(items), images, TOKENS_AROUND + TOKENS_PER_WORD * words)


def questions_of(plan: Plan) -> dict[str, Questions]:
    """Return what each benchmark asks for.

    Raises:
        TaskError: if its files can't be read.
    """
    found = {}
    for name in plan.config.tasks:
        items = get_task(name).open(task_folder(plan.config.data, name)).items
        found[name] = Questions.of(items[: plan.config.limit])
    return found


def plan_text(plan: Plan, questions: Mapping[str, Questions], gpu: Gpu | None = None, gpus: int = 1) -> str:
    """Return what a table consists of, what is missing, and what that will cost.

    Args:
        plan: the table's.
        questions: of its benchmarks.
        gpu: what times are planned for; None plans FLOP alone.
        gpus: how many.
    """
    sizes = sizes_of(plan)
    trainings = [training for training in plan.trainings if not is_trained(training)]
    cells = [cell for cell in plan.cells if not is_evaluated(cell)]
    lines = [plan.config.title, ""]
    rows = []
    total = 0.0
    for model in plan.models:
        arms = [arm for arm in plan.arms if arm.model is model]
        own = [cell for cell in cells if cell.arm.model is model]
        cost = _cells_cost(own, sizes.get(model.slug), questions)
        total += cost or 0.0
        missing = [one for one in trainings if one.config.model == model.config]
        rows.append(
            [model.name, f"{len(arms)}", f"{len(own)} of {len(arms) * len(plan.config.tasks)}",
             _flop(cost), f"{len(missing)}"]
        )  # fmt: skip
    lines.append(columns(["model", "arms", "cells to run", "FLOP, about", "trainings to run"], rows))
    asked = ", ".join(f"{name} {own.items:,}" for name, own in questions.items())
    lines += ["", f"benchmarks: {asked} questions"]
    seconds = 0.0
    for training in trainings:
        line, took = _training_line(training, gpu, gpus)
        seconds += took
        lines.append(f"to train: {training.name}: {line}")
    if gpu is not None:
        evaluating = total / (gpu.bfloat16 * 1e12 * EVALUATION_MFU * gpus)
        lines.append(
            f"predicted on {gpus} {gpu.name.upper()}: "
            f"trainings {duration(seconds)}, evaluations {duration(evaluating)} "
            f"(planned, not measured: prefills and towers at an assumed MFU of {EVALUATION_MFU:.0%}, trainings at "
            f"{MFU:.0%}; generation, loading and data are not in it)"
        )
    return "\n".join(lines)


def tera_flops(cell_spec: PruningSpec, sizes: Sizes, questions: Questions) -> float:
    """Return the TFLOP of a benchmark's mean question: the tower over its image, and the LLM's prefill."""
    return (sizes.encoding() + sizes.question(cell_spec, questions.text)) / 1e12


def _cells_cost(cells: list[Cell], sizes: Sizes | None, questions: Mapping[str, Questions]) -> float | None:
    """Return what cells of one model cost; where features are kept, images are encoded once for all of them."""
    if sizes is None:
        return None
    total = 0.0
    encoded: set[str] = set()
    for cell in cells:
        own = questions[cell.task]
        try:
            total += own.items * sizes.question(cell.arm.spec, own.text)
        except PrunetuneError:  # an impossible row, which is told elsewhere
            continue
        if cell.config.features is None:
            total += own.items * sizes.encoding()
        elif cell.task not in encoded:
            encoded.add(cell.task)
            total += own.images * sizes.encoding()
    return total


def _training_line(training: Training, gpu: Gpu | None, gpus: int) -> tuple[str, float]:
    try:
        plan = make_plan(training.config, gpu or GPUS["h200"], gpus)
    except PrunetuneError as error:
        return f"cost unknown ({error})", 0.0
    if gpu is None:
        return f"{plan.load.samples:,} samples, {plan.steps:,} steps, {plan.cost.total:.2g} FLOP", 0.0
    return plan.in_a_line(), plan.seconds


def _flop(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2g}"
