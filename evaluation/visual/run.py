"""Draws: loads the model once, encodes every image once, asks every arm, and writes figures, page and record."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunetune.configs import VisualizeConfig, to_yaml
from prunetune.data_recipes import Formatter
from prunetune.data_recipes.images import HERE, ImageOpener
from prunetune.data_recipes.placeholders import check_question
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import file_hash
from prunetune.evaluation.run.examples import told_answer
from prunetune.evaluation.visual.drawing.figure import write_png, write_svg
from prunetune.evaluation.visual.drawing.page import write_page
from prunetune.evaluation.visual.drawn import Cell, Drawing, Line, Said
from prunetune.evaluation.visual.maps import TokenMap, maps_of
from prunetune.evaluation.visual.merging import traced
from prunetune.evaluation.visual.record import FORMAT, RECORD
from prunetune.evaluation.visual.rows import Row, arms_of, columns_of, rows_of
from prunetune.evaluation.visual.sources import Asked, asked_of
from prunetune.evaluation.visual.states import WORDS, states_of
from prunetune.evaluation.visual.views import sheet_of
from prunetune.models import Arm
from prunetune.models.code import code_record
from prunetune.models.seal import sealed
from prunetune.outputs import VISUALIZATION, OutputFolder
from prunetune.plugins import plugin_records
from prunetune.pruning import PruningSpec
from prunetune.pruning.budget import Budget
from prunetune.pruning.plug import Generated
from prunetune.pruning.rewrite import Pruned
from prunetune.pruning.signals import signal_of
from prunetune.pruning.text import instruction_text
from prunetune.pruning.vision import NEWLINE, Vision

PAGE = "kept.html"


def visualize(config: VisualizeConfig, arm: Arm | None = None) -> list[Path]:
    """Draw what methods keep of images and what the model answers; return the files.

    Args:
        config: images, methods, budgets, and what is written.
        arm: one of the configuration's model with the base's projector that is loaded already; None loads it.

    Raises:
        OutputError: if the folder holds something else, or can't be written.
        TaskError: if there is nothing to draw, or it can't be laid out.
        ConfigError, CheckpointError, PruningError, DataError: for methods, weights, budgets or images that can't work.
    """
    # Before the model: what is wrong with a word should not wait for gigabytes.
    rows = rows_of(config)
    asked = asked_of(config)
    folder = output_folder(config)
    # All or none: beside those of an earlier call, half of the images would pass for a whole set.
    with folder, folder.staged(whole=True) as new:
        loaded = Arm.load(config.model, device=config.device) if arm is None else arm
        _check_takes(loaded, asked)
        arms = arms_of(rows, loaded)
        drawings = list(_drawings(config, rows, arms, loaded, asked))
        names = _write(config, drawings, rows, arms, loaded, new)
    return [folder.path / name for name in names]


def output_folder(config: VisualizeConfig) -> OutputFolder:
    """Return where a visualization is written."""
    reads = (config.model.path, config.data, *(method.adapter for method in config.methods))
    return OutputFolder(config.output, VISUALIZATION, config.overwrite, reads=(*reads, *config.images, *config.videos))


def _write(
    config: VisualizeConfig,
    drawings: Sequence[Drawing],
    rows: Sequence[Row],
    arms: Sequence[Arm],
    loaded: Arm,
    new: Path,
) -> list[str]:
    """Write all files into a folder, and return their names."""
    names = []
    for drawing in drawings:
        if "png" in config.formats:
            write_png(drawing, new / f"{drawing.name}.png")
            names.append(f"{drawing.name}.png")
        if "svg" in config.formats:
            write_svg(drawing, new / f"{drawing.name}.svg")
            names.append(f"{drawing.name}.svg")
    if "html" in config.formats:
        write_page(drawings, loaded.base.config.path, new / PAGE)
        names.append(PAGE)
    record = _record(config, drawings, rows, arms, loaded)
    record["files"] = {name: file_hash(new / name) for name in names}
    (new / RECORD).write_text(json.dumps(sealed(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    # Without the word: the file repeats the drawing, and should not write over what it repeats.
    (new / "config.yaml").write_text(to_yaml(config.model_copy(update={"overwrite": False})), encoding="utf-8")
    return [*names, RECORD]


def _check_takes(arm: Arm, asked: Sequence[Asked]) -> None:
    """Check that a model which takes no videos is not asked about any, and that one's own question is text."""
    for question in {one.question for one in asked if one.task is None}:
        check_question(arm.processor, question)
    family = arm.pruned.family
    if any(one.video for one in asked) and "video" not in family.pixels:
        takes = "gets their frames as images, which is not done here" if family.frames_are_images else "takes none"
        raise TaskError(f"model family {family.name!r} {takes}; choose a model that takes videos, or draw images")


# ---- one question after the other ------------------------------------------------------------------------------------


class _Remembered:
    """Opens the image of a question once, for the formatter and for the figure."""

    def __init__(self, images: ImageOpener) -> None:
        self._images = images
        self._opened: dict[str, Any] = {}

    def exists(self, reference: str) -> bool:
        return self._images.exists(reference)

    def open(self, reference: str, sample_id: str) -> Any:
        if reference not in self._opened:
            self._opened = {reference: self._images.open(reference, sample_id)}
        return self._opened[reference]


@dataclass(frozen=True)
class _Prompt:
    """A question as the model gets it.

    Attributes:
        inputs: the batch of one prompt, on the model's device.
        modality: "image" or "video".
        visions: for each arm the image, encoded with the signals that it reads.
        opened: as the formatter was given it.
        instruction: what methods may read of the question.
    """

    inputs: dict[str, Any]
    modality: str
    visions: Sequence[Vision]
    opened: Any
    instruction: str


@torch.inference_mode()
def _drawings(
    config: VisualizeConfig, rows: Sequence[Row], arms: Sequence[Arm], loaded: Arm, asked: Sequence[Asked]
) -> Iterator[Drawing]:
    columns = columns_of(rows)
    reading = next((arm for arm in arms if arm.pruned.reads_text), loaded)
    images = {id(one.images): _Remembered(one.images) for one in asked}
    formatters = {key: reading.formatter(opener) for key, opener in images.items()}
    for number, one in enumerate(asked):
        prompt = _prompt(one, formatters[id(one.images)], images[id(one.images)], arms, loaded)
        yield _drawing(config, f"kept_{number:02d}", one, prompt, rows, arms, loaded, columns)


def _prompt(one: Asked, formatter: Formatter, images: _Remembered, arms: Sequence[Arm], loaded: Arm) -> _Prompt:
    inputs = loaded.place(formatter.prompt_batch([one.sample]))
    family = loaded.pruned.family
    if family.unproven:
        loaded.pruned.prepare(inputs)  # admits the model, which images that are encoded already do not
    visions: list[Vision | None] = [None] * len(arms)
    modality = ""
    for needs, own in _encodings(arms):
        ((modality, vision),) = loaded.pruned.encode(inputs, needs).items()
        for number in own:
            visions[number] = vision
    opened = images.open(str(one.sample.image), one.sample.id)
    found = [vision for vision in visions if vision is not None]
    return _Prompt(inputs, modality, found, opened, instruction_text([one.sample.turns[0].question.replace(HERE, "")]))


def _encodings(arms: Sequence[Arm]) -> list[tuple[frozenset[str], list[int]]]:
    """Return which signals are read in each run of the tower, and for which arms: one run as a rule."""
    # A signal has one place, so methods that read it of different layers can't share a run.
    found: list[tuple[frozenset[str], list[int]]] = []
    for number, arm in enumerate(arms):
        for place, (needs, own) in enumerate(found):
            both = needs | arm.pruned.needs
            if len({signal_of(need).name for need in both}) == len(both):
                found[place] = (both, [*own, number])
                break
        else:
            found.append((arm.pruned.needs, [number]))
    return found


def _drawing(
    config: VisualizeConfig,
    name: str,
    one: Asked,
    prompt: _Prompt,
    rows: Sequence[Row],
    arms: Sequence[Arm],
    loaded: Arm,
    columns: Sequence[Budget],
) -> Drawing:
    vision = prompt.visions[0]
    # Before anything is answered: what can't be laid out is said at once.
    sheet = sheet_of(loaded, prompt.inputs, vision, prompt.opened, f"sample {one.sample.id!r}")
    dense = loaded.with_pruning(PruningSpec()) if loaded.spec.pruner != "identity" else loaded
    lines = []
    for row, arm, own in zip(rows, arms, prompt.visions, strict=True):
        cells = {}
        for budget in row.budgets:
            at = next(place for place, other in enumerate(columns) if other == budget and type(other) is type(budget))
            cells[at] = _cell(config, one, prompt, arm, own, budget)
        lines.append(Line(row.label, _about(row), cells))
    said = _said(one, dense, _generated(config, prompt, dense, vision, None))
    maps = _maps(rows, arms, prompt) if config.maps else []
    reference = str(one.sample.image)
    return Drawing(
        name=name,
        id=one.sample.id,
        source=f"{one.task.name}, {reference}" if one.task is not None else one.sample.id,
        question=one.question,
        answer=None if one.item is None or one.score("") is None else told_answer(one.item.answer),
        sheet=sheet,
        tokens=sum(int((origin != NEWLINE).sum()) for origin in vision.origin),
        dense=said,
        columns=columns,
        lines=lines,
        maps=maps,
        video=prompt.modality == "video",
    )


def _about(row: Row) -> str:
    """Return what tells a row apart beside its label."""
    told = [f"{name} {value}" for name, value in row.method.options.items()]
    told += [f"{stage.name} inside the LLM" for stage in row.spec.stages]
    if row.label.split(",")[0] != row.spec.pruner:
        told.insert(0, row.spec.pruner)
    if row.tuned_for is not None:
        told.append(f"tuned for {row.tuned_for.get('pruner')}, {row.tuned_for.get('keep')}")
    return "; ".join(told)


def _cell(config: VisualizeConfig, one: Asked, prompt: _Prompt, arm: Arm, vision: Vision, budget: Budget) -> Cell:
    generated = _generated(config, prompt, arm, vision, budget)
    encoded = {prompt.modality: vision}
    pruned = traced(arm.pruned).prepare(prompt.inputs, padding_side="left", keep=budget, vision=encoded)
    lost = None if generated.final is None else _lost(arm, prompt, pruned, generated.final)
    notes: dict[str, float] = {}
    for own in generated.notes[prompt.modality]:
        notes |= {name: value for name, value in own.items() if math.isfinite(value)}
    return Cell(
        states=states_of(pruned.chosen[prompt.modality], lost),
        said=_said(one, arm, generated),
        kept=sum(generated.kept[prompt.modality]),
        layers=tuple(generated.layers[0]) if generated.layers else (),
        notes=notes,
    )


def _generated(config: VisualizeConfig, prompt: _Prompt, arm: Arm, vision: Vision, budget: Budget | None) -> Generated:
    # The stock model's own greedy decoding, as evaluations answer: Arm.answer with images that are encoded already.
    options: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "do_sample": False}
    return arm.pruned.generate(**prompt.inputs, keep=budget, vision={prompt.modality: vision}, **options)


def _said(one: Asked, arm: Arm, generated: Generated) -> Said:
    (text,) = arm.processor.batch_decode(generated.tokens, skip_special_tokens=True)
    return Said(text.strip(), one.score(text.strip()))


def _lost(arm: Arm, prompt: _Prompt, pruned: Pruned, final: Tensor) -> Tensor:
    """Return the numbers of the tokens that reach the LLM and not its last layer."""
    token = arm.pruned.family.token_id(arm.model, prompt.modality)
    stays = pruned.keep[0][prompt.inputs["input_ids"][0] == token]  # (S,) which slots stay
    origin = torch.cat(pruned.vision[prompt.modality].origin)[stays]  # (K,)
    left = final[0][pruned.inputs["input_ids"][0] == token]  # (K,) which of them the last layer processes
    return origin[~left & (origin != NEWLINE)]


def _maps(rows: Sequence[Row], arms: Sequence[Arm], prompt: _Prompt) -> list[TokenMap]:
    """Return the maps of what methods read; a tuned projector's cosines are not shown, which would be others."""
    read = []
    for row, arm, vision in zip(rows, arms, prompt.visions, strict=True):
        if row.adapter is None:
            read.append((row.label, arm, vision))
    images = len(prompt.visions[0].slots)
    return maps_of(read, prompt.instruction, [0] * images)


# ---- the record ------------------------------------------------------------------------------------------------------


def _record(
    config: VisualizeConfig, drawings: Sequence[Drawing], rows: Sequence[Row], arms: Sequence[Arm], loaded: Arm
) -> dict[str, Any]:
    """Return what was drawn, and everything that decides it."""
    arms_told = []
    for row, arm in zip(rows, arms, strict=True):
        arms_told.append(
            {
                "label": row.label,
                "pruning": arm.pruning.model_dump(),
                "budgets": list(row.budgets),
                "adapter": row.adapter,
                "tuned_for": row.tuned_for,
                "projector_hash": arm.projector_hash,
                "text_tower_hash": arm.text_tower_hash,
            }
        )
    return {
        "format": FORMAT,
        "model": config.model.model_dump(),
        "frozen_hash": loaded.base.hashes.frozen_hash,
        "original_projector_hash": loaded.base.hashes.original_projector_hash,
        "projectors": list(loaded.base.hashes.projectors),
        "settings_hash": loaded.base.settings_hash,
        "template_hash": loaded.template_hash,
        "max_new_tokens": config.max_new_tokens,
        "video": config.video.model_dump() if any(drawing.video for drawing in drawings) else None,
        "device": torch.cuda.get_device_name() if loaded.device.type == "cuda" else platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "prunetune": code_record(),
        "plugins": plugin_records(),
        "arms": arms_told,
        "drawings": [_told(drawing) for drawing in drawings],
    }


def _told(drawing: Drawing) -> dict[str, Any]:
    cells = []
    for line in drawing.lines:
        for column, cell in sorted(line.cells.items()):
            by_state = {}
            for number, word in enumerate(WORDS):
                by_state[word] = (cell.states.state == number).nonzero()[0].tolist()
            merged = [[token, int(cell.states.into[token])] for token in by_state.pop("merged")]
            del by_state["dropped"]  # the rest
            cells.append(
                {
                    "arm": line.label,
                    "budget": drawing.columns[column],
                    "answer": cell.said.text,
                    "score": cell.said.score,
                    "reached_llm": cell.kept,
                    "layers": list(cell.layers),
                    "notes": dict(cell.notes),
                    "tokens": {**by_state, "merged_into": merged, "merging_known": cell.states.traced},
                }
            )
    views = []
    for view in drawing.sheet.views:
        views.append({"name": view.name, "grid": list(view.grid), "first_token": int(view.numbers[0])})
    return {
        "name": drawing.name,
        "id": drawing.id,
        "source": drawing.source,
        "question": drawing.question,
        "answer": drawing.answer,
        "tokens": drawing.tokens,
        "views": views,
        "dense": {"answer": drawing.dense.text, "score": drawing.dense.score},
        "cells": cells,
    }
