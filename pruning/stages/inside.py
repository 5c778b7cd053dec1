"""Stages of a pruned model: whether its family can have them, and what they count of each image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from transformers import PreTrainedModel

from prunetune.pruning.errors import PruningError
from prunetune.pruning.families.base import Family, family_of
from prunetune.pruning.rewrite import Pruned
from prunetune.pruning.spec import StageSpec
from prunetune.pruning.stages.decoder import decoder_of
from prunetune.pruning.stages.plan import Plan
from prunetune.pruning.stages.run import Stages
from prunetune.pruning.stages.schedule import Schedule, schedule_of


def stages_of(model: PreTrainedModel, family: Family, specs: Sequence[StageSpec]) -> Stages | None:
    """Return the stages that a specification names for a model; None if it names none.

    Raises:
        PruningError: in one line, for a model that can't have them, and for boundaries and budgets that don't fit.
    """
    if not specs:
        return None
    if family.unproven:
        raise PruningError(
            f"model_type {model.config.model_type!r} has no family of its own, and nobody has looked how its layers "
            "take masks and positions, so stages can't run in it; leave pruning.stages out"
        )
    levels = getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    decoder = decoder_of(family.llm(model), len(levels))
    schedule = schedule_of(specs, len(decoder.layers), decoder.lowest, decoder.why)
    for point in schedule.points:
        if point.stage.dense and family.counts_rows_and_columns:
            raise PruningError(
                f"stage {point.name!r} numbers tokens anew, and positions of family {family.name!r} count rows and "
                "columns, so they would be another model's; choose original positions in its options, or another stage"
            )
        if point.stage.merges and family.sees_both_ways:
            raise PruningError(
                f"stage {point.name!r} merges tokens, and in family {family.name!r} images see themselves both ways, "
                "of which a merged token has no place; choose another stage"
            )
    return Stages(schedule, decoder, family.token_ids(model))


def schedule_in(model: PreTrainedModel, specs: Sequence[StageSpec]) -> Schedule | None:
    """Return when stages run in a model, which may lie on the meta device; None if there are none.

    Raises:
        PruningError: as of :func:`stages_of`.
    """
    stages = stages_of(model, family_of(model), specs)
    return None if stages is None else stages.schedule


def counted_inside(
    model: PreTrainedModel, family: Family, pruned: Pruned, plan: Plan, copies: int
) -> dict[str, list[dict[str, float]]]:
    """Return for each modality what stages left of each image: its tokens in the last layer, and the layers' mean.

    Args:
        model: the stock model.
        family: its family.
        pruned: the prompts.
        plan: what was decided.
        copies: how many rows of the plan each prompt has; with beams these are alike.
    """
    ids, mask = pruned.inputs["input_ids"], pruned.inputs["attention_mask"].bool()
    layers = plan.schedule.layers
    found: dict[str, list[dict[str, float]]] = {}
    for modality, rows in pruned.rows.items():
        token = family.token_id(model, modality)
        own = (ids == token) & mask
        sums = torch.zeros(len(rows), device=ids.device)
        last = sums
        for begin, end, kept in _spans(plan):
            counts = _by_image(own, kept[::copies], pruned.kept[modality])
            sums = sums + counts * (end - begin)
            last = counts
        found[modality] = [
            {"llm_final_tokens": final, "llm_average_tokens": total / layers}
            for final, total in zip(last.tolist(), sums.tolist(), strict=True)
        ]
    return found


def _spans(plan: Plan) -> list[tuple[int, int, torch.Tensor]]:
    """Return from which layer to which each set of visual columns is left."""
    boundaries = [0, *(point.boundary for point in plan.schedule.points), plan.schedule.layers]
    return [(begin, end, plan.kept_columns(begin)) for begin, end in pairwise(boundaries)]


def _by_image(own: torch.Tensor, kept: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return how many columns of each image are kept; images stand in reading order, ``lengths`` columns each."""
    stays = kept[own].float()  # (S,) in reading order
    ends = torch.tensor(list(lengths), device=stays.device).cumsum(dim=0)
    total = torch.cat([stays.new_zeros(1), stays.cumsum(dim=0)])
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return total[ends] - total[starts]
