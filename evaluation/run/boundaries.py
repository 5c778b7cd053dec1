"""Fit the boundary of a stage that withdraws all visual tokens: the first layer at which answers hardly change."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from prunetune.evaluation.errors import TaskError
from prunetune.models import Arm
from prunetune.models.profile import Measured
from prunetune.pruning import PruningSpec, StageSpec
from prunetune.pruning.stages.methods.vtw import changes, first_small
from prunetune.pruning.stages.registry import stage_class

FIRST = 5
"""The paper searches from this layer on; of models that have no more layers, from the lowest that can be."""
MEASURE = "minus KL to all tokens, of the first answer token"


def open_stage(spec: PruningSpec) -> StageSpec | None:
    """Return the stage whose boundary is to be fitted: it withdraws all tokens, and names no layer; None without one.

    Raises:
        TaskError: for two of them.
        PruningError: for an unknown stage.
    """
    found = [stage for stage in spec.stages if stage.boundaries is None and stage_class(stage.name).drops_all]
    if len(found) > 1:
        raise TaskError("pruning.stages withdraws all visual tokens twice; the later stage has nothing to do")
    return found[0] if found else None


def fit_boundary(
    whole: Arm, stage: StageSpec, batches: Iterable[dict[str, Any]], eta: float
) -> tuple[list[Measured], int]:
    """Return how much withdrawing at each layer changes the answers, and the first layer at which that is little.

    Args:
        whole: without the stage; what else prunes does so on both sides.
        stage: whose boundary is to be found.
        batches: prompts of a formatter.
        eta: the largest change, the mean over samples of KL(withdrawn || all tokens).

    Raises:
        PruningError: if every layer changes more.
    """
    at: list[Arm] = []
    layers = _layers(whole)
    others = whole.pruned.stages
    taken = max((point.boundary for point in others.schedule.points), default=0) if others is not None else 0
    first = FIRST if layers > FIRST + 1 else 1
    if taken >= first:
        raise TaskError(
            f"{stage.name} is searched from layer {first} on, and another stage has boundary {taken}; fit "
            f"{stage.name} by itself, and write its boundary into pruning.stages"
        )
    first = max(first, _lowest(whole, stage, layers - 1))
    for boundary in range(first, layers):
        at.append(_with(whole, stage, boundary))
    found: list[Tensor] = []
    for batch in batches:
        full = _first_logits(whole, batch)
        found.append(torch.stack([changes(full, _first_logits(one, batch)) for one in at], dim=1).cpu())  # (B, K)
    change = torch.cat(found).mean(dim=0)
    best = first_small(change, first, eta)
    rows = [Measured(value=first + place, score=-round(float(one), 6)) for place, one in enumerate(change)]
    return rows, best


def _layers(arm: Arm) -> int:
    model: Any = arm.model
    return int(model.config.get_text_config().num_hidden_layers)


def _with(whole: Arm, stage: StageSpec, boundary: int) -> Arm:
    """Return the arm with the stage at a boundary."""
    here = stage.model_copy(update={"boundaries": [boundary]})
    return whole.with_pruning(whole.spec.model_copy(update={"stages": [*whole.spec.stages, here]}))


def _lowest(whole: Arm, stage: StageSpec, highest: int) -> int:
    """Return the lowest boundary that the model can have."""
    stages = _with(whole, stage, highest).pruned.stages
    assert stages is not None  # there is one
    return stages.decoder.lowest


def _first_logits(arm: Arm, batch: dict[str, Any]) -> Tensor:
    """Return the logits (B, V) of the first answer token."""
    prepared = arm.pruned.prepare(arm.place(batch), padding_side="left")
    model: Any = arm.model
    kept = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits: Tensor = arm.pruned.run(prepared, {**prepared.inputs, **kept}).logits
    return logits[:, -1]
