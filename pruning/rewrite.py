"""From a choice to model inputs: which slots stay, what stands in them, and the shortened batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.pruning.errors import PruningError
from prunetune.pruning.families.base import Family
from prunetune.pruning.select import Candidates
from prunetune.pruning.sequence import shorten
from prunetune.pruning.types import Selection
from prunetune.pruning.vision import NEWLINE, Vision


@dataclass(frozen=True)
class Chosen:
    """What the pruner kept of one modality of a batch.

    Attributes:
        vision: the images.
        candidates: what the pruner chose from.
        selections: what it kept of each.
    """

    vision: Vision
    candidates: list[Candidates] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)

    def kept_tokens(self) -> Tensor:
        """Return which of all tokens are kept, (T,) boolean; T counts through all groups."""
        kept = torch.zeros(self.vision.total, dtype=torch.bool, device=self.vision.slots[0].device)
        for among, selection in zip(self.candidates, self.selections, strict=True):
            if isinstance(selection.indices, Tensor):
                kept[among.numbers.gather(1, selection.indices).flatten()] = True
                continue
            for item, indices in enumerate(selection.indices):
                kept[among.numbers[item, indices]] = True
        return kept

    def merged_tokens(self) -> tuple[Tensor, Tensor]:
        """Return where merged features stand and what they are: (M,) numbers and (M, C) pre-projector features."""
        places, features = [self.vision.origin[0][:0]], [self.vision.groups[0].features[0, :0]]
        for among, selection in zip(self.candidates, self.selections, strict=True):
            for item, merged in enumerate(selection.merged or ()):
                places.append(among.numbers[item, selection.slots_of(item)])
                features.append(merged)
        return torch.cat(places), torch.cat(features)


@dataclass(frozen=True)
class Pruned:
    """Rewritten inputs, and what became of the images.

    Attributes:
        inputs: keyword arguments for the stock model.
        keep: (B, L) boolean over the full sequence, which of its positions are still there; padding counts as kept.
        chosen: what was kept of each modality: its images, the candidates and the selections.
        kept: for each modality how many visual tokens of each image reach the LLM, images in reading order.
    """

    inputs: dict[str, Any]
    keep: Tensor
    chosen: Mapping[str, Chosen] = field(default_factory=dict)
    kept: Mapping[str, list[int]] = field(default_factory=dict)

    @property
    def vision(self) -> dict[str, Vision]:
        """The encoded images, by modality."""
        return {modality: choice.vision for modality, choice in self.chosen.items()}

    @property
    def selections(self) -> dict[str, list[Selection]]:
        """What the pruner kept, by modality, one selection per group of candidates."""
        return {modality: choice.selections for modality, choice in self.chosen.items()}


def staying_slots(vision: Vision, kept: Tensor, newline: str) -> Tensor:
    """Return which of all images' slots stay, (S,) boolean: those of kept tokens, and row ends by policy.

    With "rows" a row end stays if a token of its row does. An image of which nothing is dropped stays whole: a row of
    padding alone, which the model cuts down to its end, has no token that could hold it.

    Args:
        vision: the images, S slots in all.
        kept: (T,) which tokens are kept.
        newline: "rows", "all" or "none".
    """
    origin = torch.cat(vision.origin)
    is_end = origin == NEWLINE
    stays = kept[origin.clamp(min=0)] & ~is_end
    if newline == "all":
        return stays | is_end
    if newline == "rows" and vision.row:
        return stays | (is_end & _row_is_held(vision, stays, is_end))
    return stays


def _row_is_held(vision: Vision, stays: Tensor, is_end: Tensor) -> Tensor:
    """Return for every slot whether a token of its row stays, or its image loses no token at all, (S,)."""
    lengths = torch.tensor(vision.lengths, device=stays.device)
    image = torch.arange(len(lengths), device=stays.device).repeat_interleave(lengths, output_size=len(stays))
    row = torch.cat(vision.row)
    place = image * (max(vision.lengths) + 1) + row + 1  # place 0 of an image is that of no row
    in_row = torch.zeros(len(lengths) * (max(vision.lengths) + 1), dtype=torch.long, device=stays.device)
    in_row = in_row.index_add(0, place, stays.long())
    dropped = torch.zeros_like(lengths).index_add(0, image, (~stays & ~is_end).long())
    return ((in_row[place] > 0) & (row >= 0)) | (dropped[image] == 0)


def slot_features(
    vision: Vision, stays: Tensor, merged: tuple[Tensor, Tensor] | None, project: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the features (K, D) of all staying slots.

    Merged tokens stand in the slots they were made around, in every family; those that were made around none, such as
    [CLS], stand in a slot that is free.

    Args:
        vision: the images, S slots in all.
        stays: (S,) which slots stay.
        merged: numbers (M,) and pre-projector features (M, C) of merged tokens; None for a method that never merges.
        project: from pre-projector features to the LLM's space.
    """
    plain = torch.cat(vision.slots)[stays]
    if merged is None:
        return plain
    places, features = merged
    projected = project(features)  # in one call, also of nothing: under ZeRO-3 all ranks call it equally often
    if not len(places):
        return plain
    order = torch.arange(len(places), device=places.device)
    row_of = torch.full((vision.total,), -1, device=places.device).index_copy(0, places, order)
    origin = torch.cat(vision.origin)[stays]
    row = torch.where(origin == NEWLINE, -1, row_of[origin.clamp(min=0)])
    return torch.where((row >= 0)[:, None], projected[row.clamp(min=0)], plain)


def rewrite(
    model: nn.Module,
    family: Family,
    inputs: Mapping[str, Any],
    chosen: Mapping[str, Chosen],
    places: Mapping[str, Tensor],
    newline: str,
    position_policy: str,
    padding_side: str,
    merges: bool,
) -> Pruned:
    """Shorten a batch to what was chosen, and put the kept features where the stock model takes them.

    Args:
        model: the stock model.
        family: its family.
        inputs: the full batch.
        chosen: per modality.
        places: per modality the row and column (S, 2) of all placeholders, in reading order.
        newline: which row ends stay.
        position_policy: "compact" or "original".
        padding_side: where the shortened rows are padded.
        merges: whether the method may return merged features.
    """
    keep = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    outputs, counts = {}, {}
    for modality, choice in chosen.items():
        vision = choice.vision
        stays = staying_slots(vision, choice.kept_tokens(), newline)
        row, column = places[modality].unbind(dim=1)
        keep[row, column] = stays
        counts[modality] = _per_image(stays, vision.lengths)
        merged = choice.merged_tokens() if merges else None
        features = slot_features(vision, stays, merged, lambda rows: family.project(model, rows))
        levels = [torch.cat(level)[stays].split(counts[modality]) for level in vision.levels]
        outputs[modality] = family.put_back(list(features.split(counts[modality])), [list(level) for level in levels])
    positions = family.positions(model, inputs) if position_policy == "original" else None
    result = shorten(inputs, keep, positions, padding_side, family.aligned)
    for name in (*family.pixels.values(), *family.replaced, *family.left_out()):
        result.pop(name, None)
    if outputs:
        result["mm_encoder_outputs"] = outputs
    return Pruned(result, keep, dict(chosen), counts)


def _per_image(stays: Tensor, lengths: list[int]) -> list[int]:
    """Return how many slots of each image stay; one number an image is read back from the device, in one go."""
    ends = torch.tensor(lengths, device=stays.device).cumsum(0)
    total = torch.cat([ends.new_zeros(1), stays.long().cumsum(0)])
    return total[ends].diff(prepend=ends.new_zeros(1)).tolist()


def check_inputs(inputs: Mapping[str, Any], family: Family) -> None:
    """Check that the family knows what to do with every input that pruning touches.

    Raises:
        PruningError: naming pixels of a modality that the family does not prune, which would run unpruned, or an input
            of the sequence's shape that would stay longer than the shortened sequence.
    """
    known = {"input_ids", "attention_mask", "labels", "position_ids", *family.aligned, *family.unread}
    known |= {*family.pixels.values(), *family.replaced}
    shape = inputs["input_ids"].shape
    for name, value in inputs.items():
        if name in known:
            continue
        if name.startswith("pixel_values"):
            raise PruningError(
                f"family {family.name!r} prunes {' and '.join(family.pixels)}s, and this batch holds {name!r}, which "
                "would run unpruned; leave it out, or add the modality to the family"
            )
        if isinstance(value, Tensor) and value.shape == shape:
            raise PruningError(
                f"the input {name!r} has the sequence's shape {tuple(shape)}, and family {family.name!r} does not say "
                "how pruning cuts it; add it to the family's `aligned` inputs, or leave it out"
            )
