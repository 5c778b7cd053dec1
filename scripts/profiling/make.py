"""From a table's YAML to its arms' costs: load each model once, measure its arms side by side, write them down."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from prunetune.configs import ConfigError, TableConfig
from prunetune.errors import PrunetuneError
from prunetune.models import Arm
from prunetune.models.arm import default_device
from prunetune.models.blueprint import model_of_random_weights, model_without_weights, pruned_without_tokenizer
from prunetune.models.code import code_record
from prunetune.models.profile import resolved
from prunetune.outputs import TABLE, OutputFolder
from prunetune.pruning import PruningSpec
from prunetune.reading import one_line
from prunetune.screen import libraries_in, say
from prunetune.scripts.profiling.accounting import cache_bytes, flop_of
from prunetune.scripts.profiling.energy import energy_counter
from prunetune.scripts.profiling.measure import Settings, Subject, measure
from prunetune.scripts.profiling.page import MIB, computed_markdown, to_markdown
from prunetune.scripts.profiling.record import PAGE, PROFILE, Costs, ModelCost
from prunetune.scripts.profiling.requests import Asked, MadeUp, Requests, first_questions
from prunetune.scripts.tables.cells import Model, Plan, lay_out
from prunetune.train.flops import Work, image
from prunetune.train.shape import shape_of
from prunetune.train.visual import visual_layers, visual_of


def profile_table(
    config: TableConfig,
    settings: Settings,
    device: str | None = None,
    random_weights: bool = False,
    text: int = 60,
    side: int = 672,
) -> Path:
    """Measure every arm of a table, and write ``profile.json`` and ``profile.md`` into the table's folder.

    Arms that differ in their projector alone compute the same, and are measured once.

    Args:
        config: the table's.
        settings: how it is measured.
        device: None is this process's GPU, or the CPU where there is none.
        random_weights: draw the weights of the models' shapes, and make up requests; nothing is downloaded.
        text: tokens of a made-up request beside the image's.
        side: height and width of its image, where the model takes any.

    Raises:
        ConfigError: for a YAML that contradicts itself.
        OutputError: if the folder is in use, holds something else, or can't be written.
        CheckpointError, TaskError, PruningError: if a model can't run without pruning.
    """
    plan = lay_out(config)
    place = torch.device(default_device() if device is None else device)
    # Whatever overwrite says: the table stays.
    with OutputFolder(config.output, TABLE) as folder, libraries_in(plan.output / "libraries.log"):
        models = []
        for model in plan.models:
            if random_weights:
                models.append(_drawn(plan, model, settings, place, text, side))
            else:
                models.append(_loaded(plan, model, settings, place))
        costs = Costs(
            models=models,
            new_tokens=settings.new_tokens,
            repeats=settings.repeats,
            warmup=settings.warmup,
            device=torch.cuda.get_device_name(place) if place.type == "cuda" else platform.machine(),
            threads=torch.get_num_threads(),
            versions={name: version(name) for name in ("torch", "transformers")},
            notes=list(_notes(place, settings)),
            prunetune=code_record(),
        )
        page = to_markdown(costs)
        with folder.staged() as new:
            (new / PROFILE).write_text(costs.to_text(), encoding="utf-8")
            (new / PAGE).write_text(page, encoding="utf-8")
    print(page)
    return folder.path


def _loaded(plan: Plan, model: Model, settings: Settings, device: torch.device) -> ModelCost:
    """Measure the arms of a model with its own weights, on the first questions of the table's first benchmark."""
    task, questions = first_questions(plan.config)
    base = Arm.load(model.config, device=str(device))

    def made(spec: PruningSpec) -> tuple[Arm, Requests]:
        arm = base.with_pruning(spec)
        return arm, Asked(arm, questions, plan.config)

    subjects = []
    for row, label, spec in _rows(plan, model):
        try:
            arm, requests = made(spec)
            subjects.append(_tried(Subject(row, label, spec, arm.pruned, requests)))
        except PrunetuneError as error:
            subjects.append(Subject(row, label, spec, refused=one_line(error)))
    arms = measure(_with_dense(model, subjects), settings, say)
    asked = f"the first questions of {task}"
    return ModelCost(
        name=model.name, config=model.config, random_weights=False, frozen_hash=base.base.frozen_hash, asked=asked,
        arms=arms,
    )  # fmt: skip


def _drawn(plan: Plan, model: Model, settings: Settings, device: torch.device, text: int, side: int) -> ModelCost:
    """Measure the arms of a model's shape, on noise."""
    stock = model_of_random_weights(model.config, device)
    subjects = []
    for row, label, spec in _rows(plan, model):
        try:
            pruned = pruned_without_tokenizer(stock, resolved(spec))
            subjects.append(_tried(Subject(row, label, spec, pruned, MadeUp(pruned, text, side))))
        except PrunetuneError as error:
            subjects.append(Subject(row, label, spec, refused=one_line(error)))
    arms = measure(_with_dense(model, subjects), settings, say)
    asked = f"noise of {side} x {side} pixels where the model takes any size, and {text} random tokens"
    return ModelCost(
        name=model.name, config=model.config, random_weights=True, frozen_hash=None, asked=asked, arms=arms
    )


def _rows(plan: Plan, model: Model) -> Iterator[tuple[str, str, PruningSpec]]:
    """Yield name, label and pruning of every arm that computes something else than those before it."""
    seen: list[PruningSpec] = []
    for arm in plan.arms:
        if arm.model is model and arm.spec not in seen:
            seen.append(arm.spec)
            label = f"{arm.label}, {arm.spec.budget}" if arm.spec.budget else arm.label
            yield arm.row, "dense" if arm.spec.dense else label, arm.spec


@torch.inference_mode()
def _tried(subject: Subject) -> Subject:
    """Return an arm after it has pruned a request: what can't work shows then, and not in the middle of a round."""
    pruned, requests = subject.ready
    pruned.prepare(requests.batch([0]))
    return subject


def _with_dense(model: Model, subjects: list[Subject]) -> list[Subject]:
    if subjects[0].refused is not None:
        raise ConfigError(f"{model.name} can't be measured without pruning, so no arm can: {subjects[0].refused}")
    for subject in subjects:
        if subject.refused is not None:
            say(f"{model.name}, {subject.label}: not measured: {subject.refused}")
    return subjects


def _notes(device: torch.device, settings: Settings) -> Iterator[str]:
    yield "inputs: images opened, the processor, and the copy to the device; not in the first token's time."
    if device.type != "cuda":
        yield "peak memory is not measured on a CPU: the process's own says nothing of one arm."
    _, why = energy_counter(device)
    if why:
        yield f"{why}."
    elif not settings.clients:
        yield "energy is measured under load alone (--clients)."


def computed_table(config: TableConfig, new_tokens: int, text: int, side: int) -> str:
    """Return what follows from the models' shapes alone, as Markdown; nothing runs and no weight is read.

    Raises:
        ConfigError, CheckpointError, PruningError: as of :func:`profile_table`.
    """
    plan = lay_out(config)
    parts = []
    for model in plan.models:
        stock = model_without_weights(model.config.path, model.config.revision)
        shape, visual = shape_of(stock), visual_of(stock, side, side)
        vision = image(visual.patches, visual.items) + Work(projected=visual.items * visual.tokens)
        element = getattr(torch, model.config.dtype).itemsize
        rows: dict[str, dict[str, float]] = {}
        inside_somewhere = any(spec.stages for _, _, spec in _rows(plan, model))
        for _, label, spec in _rows(plan, model):
            try:
                kept = visual.kept(resolved(spec))
                inside = visual_layers(stock, spec, kept)
            except PrunetuneError as error:
                say(f"{model.name}, {label}: not computed: {one_line(error)}")
                continue
            layers = [tokens + text for tokens in inside]
            flop = flop_of(shape, vision, layers, new_tokens)
            found = {"visual tokens": float(kept)}
            if inside_somewhere:
                found["visual tokens per layer"] = sum(inside) / len(inside)
            found |= {f"{part}, TFLOP": value / 1e12 for part, value in flop.parts().items()}
            found |= {"total, TFLOP": flop.total / 1e12}
            found |= {"cache, MiB": cache_bytes(shape.language, layers, element) / MIB}
            dense = rows.get("dense", found)
            found["prefill fewer, x"] = dense["prefill, TFLOP"] / found["prefill, TFLOP"]
            found["total fewer, x"] = dense["total, TFLOP"] / found["total, TFLOP"]
            rows[label] = found
        about = f"{model.name}: {text} text tokens, answers of {new_tokens}"
        parts.append(computed_markdown(about, rows))
    return "\n".join(parts)
