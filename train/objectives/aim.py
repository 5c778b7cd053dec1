"""An aim: an objective with the engine that reads the model for it, and the teacher and anchor that it asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunetune.configs.schema import ObjectiveConfig
from prunetune.data_recipes.formatting import supervised
from prunetune.models.features.batches import WHOLE
from prunetune.train.engine.engine import Engine
from prunetune.train.engine.layout import loss_weights
from prunetune.train.engine.reading import text_behind_images
from prunetune.train.flops import Work
from prunetune.train.objectives.anchor import Anchor
from prunetune.train.objectives.live import LiveTeacher
from prunetune.train.objectives.objective import Losses, Objective, Taught


class Teacher(Protocol):
    """Says of a batch what the model with all visual tokens and its original projector makes of it."""

    def taught(self, inputs: Mapping[str, Any]) -> Taught:
        """Return what it says of a batch of the formatter that is on the device."""
        ...


class Aim:
    """Makes losses of batches.

    Args:
        engine: runs the model; it reads what the objective asks for.
        objective: None is the cross entropy of the answers.
        teacher: None where no term compares with one.
        anchor: None where that is no term.
        head: whose logits are made a piece at a time, see :meth:`Engine.own_head`.
    """

    def __init__(
        self,
        engine: Engine,
        objective: Objective | None = None,
        teacher: Teacher | None = None,
        anchor: Anchor | None = None,
        head: nn.Linear | None = None,
    ) -> None:
        self.engine, self.teacher, self.anchor, self.head = engine, teacher, anchor, head
        self.objective = Objective(ObjectiveConfig()) if objective is None else objective

    @property
    def several(self) -> bool:
        """Whether the loss is more than the cross entropy."""
        return list(self.objective.weights) != ["ce"]

    @contextmanager
    def attached(self, device: torch.device | str) -> Iterator[None]:
        """While open, the model prunes by itself, and losses can be asked for.

        Args:
            device: where the model is, by now.
        """
        with ExitStack() as undo:
            if isinstance(self.teacher, LiveTeacher):
                undo.enter_context(self.teacher.attached(device))
            undo.enter_context(self.engine.attached())
            undo.enter_context(self.engine.own_head(self.head))
            yield

    def units(self, batch: Mapping[str, Any], first: bool = True, counts: bool = True) -> dict[str, int]:
        """Return how many of each of the objective's units a batch has, before pruning: of any layout as many.

        Args:
            batch: of the formatter.
            first: whether it is the first of its update on this rank.
            counts: whether its samples are trained on.
        """
        found = {"answers": 0, "text": 0, "images": 0, "update": int(first)}
        if counts:
            ids, visual = batch["input_ids"], self.engine.visual
            found["answers"] = int(supervised(batch["labels"]).sum())
            if "text" in self.objective.units:
                found["text"] = int(text_behind_images(ids, batch["attention_mask"], visual).sum())
            if "images" in self.objective.units:
                is_visual = torch.isin(ids, torch.tensor(visual, device=ids.device))
                found["images"] = int(is_visual.any(dim=1).sum())
        return {unit: found[unit] for unit in self.objective.units}

    def losses(
        self, model: nn.Module, inputs: Mapping[str, Any], tower: Work | None = None, counts: bool = True
    ) -> Losses:
        """Return the losses of a batch, each summed over its units.

        Args:
            model: what to call: the model itself, or what a trainer wrapped around it.
            inputs: a batch of the formatter, with labels, on the device.
            tower: what its images ask of the tower, for the numbers.
            counts: whether its samples are trained on, for the numbers.
        """
        inputs = dict(inputs)
        taught = Taught()
        if self.teacher is not None:
            with self.engine.phase("teacher"):
                taught = self._asked(inputs)
        inputs.pop(WHOLE, None)
        read = self.engine.read(model, inputs, tower, counts)
        with self.engine.phase("forward"):
            return self.objective.losses(read, taught, self.anchor)

    def _asked(self, inputs: dict[str, Any]) -> Taught:
        """Return what the teacher says; images are encoded once for both."""
        assert self.teacher is not None
        pruned = self.engine.pruned
        shared = isinstance(self.teacher, LiveTeacher) and "stored" not in inputs and not pruned.family.unproven
        if shared:
            with torch.no_grad():
                # Both apply their own projector to it, which gives the bits that encoding with it would.
                inputs["vision"] = pruned.encode(inputs)
        return self.teacher.taught(inputs)

    @property
    def held_out_units(self) -> tuple[str, ...]:
        """The units of what is measured on held-out samples; an anchor, which is none of theirs, is left out."""
        return ("answers",) if self.objective.labelled else tuple(u for u in self.objective.units if u != "update")

    def held_out_counts(self, batch: Mapping[str, Any]) -> list[int]:
        """Return how many of each unit of a held-out batch there are."""
        found = self.units(batch)
        return [found[unit] for unit in self.held_out_units]

    def held_out_sums(self, model: nn.Module, inputs: Mapping[str, Any]) -> Float[Tensor, " units"]:
        """Return what is measured on a held-out batch, summed by unit.

        It is the cross entropy of the answers where the run trains towards them, whatever else is in its objective, so
        that runs compare; the objective itself where it does not.
        """
        if self.objective.labelled:
            return self.cross_entropy(model, inputs)[None]
        found = self.losses(model, inputs).units
        return torch.stack([found[unit] for unit in self.held_out_units])

    def held_out_told(self) -> str:
        """Return what is measured on held-out samples, for people."""
        if self.objective.labelled:
            return "ce"
        return self.objective.told()

    def cross_entropy(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Return the cross entropy of a batch summed over its supervised tokens, of an objective that reads these."""
        return self.engine.summed_loss(model, {name: value for name, value in inputs.items() if name != WHOLE})


def scales_of(units: Sequence[Mapping[str, int]], loss: str) -> tuple[list[list[float]], list[int]]:
    """Return what the losses of each micro-batch are multiplied by, and what the sums over all ranks are divided by.

    Args:
        units: of each micro-batch, by unit.
        loss: see :func:`~prunetune.train.engine.layout.loss_weights`.

    Returns:
        For each micro-batch a factor by unit, and for each unit a number.
    """
    columns, numbers = [], []
    for unit in units[0]:
        weights, number = loss_weights([own[unit] for own in units], loss)
        columns.append(weights)
        numbers.append(number)
    return [list(row) for row in zip(*columns, strict=True)], numbers
