"""From a choice to model inputs: which slots stay, what stands in them, and the shortened batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from prunetune.pruning.errors import PruningError
from prunetune.pruning.families.base import Family, PrunedOutput
from prunetune.pruning.ops.precision import exact_float32
from prunetune.pruning.select import Candidates
from prunetune.pruning.sequence import shorten
from prunetune.pruning.stored import StoredImages
from prunetune.pruning.types import Selection
from prunetune.pruning.vision import NEWLINE, Vision


def gathered_notes(notes: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each note over those that have it: of ``[{"a": 1.0}, {"a": 3.0, "b": 2.0}]`` 2.0 and 2.0."""
    values: dict[str, list[float]] = {}
    for noted in notes:
        for name, value in noted.items():
            values.setdefault(name, []).append(value)
    return means(values)


def means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the mean under each name."""
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


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

    def kept_tokens(self) -> Bool[Tensor, " T"]:
        """Return which of all tokens are kept, (T,) boolean; T counts through all groups.

        Of two images with 3 tokens each, the selections ``[0, 2]`` and ``[1, 2]`` keep
        ``[True, False, True, False, True, True]``.
        """
        kept = torch.zeros(self.vision.total, dtype=torch.bool, device=self.vision.slots[0].device)
        for among, selection in zip(self.candidates, self.selections, strict=True):
            if isinstance(selection.indices, Tensor):
                kept[among.numbers.gather(1, selection.indices).flatten()] = True
                continue
            for item, indices in enumerate(selection.indices):
                kept[among.numbers[item, indices]] = True
        return kept

    def kept_per_frame(self) -> list[list[int]]:
        """Return for each video, or image, how many tokens each of its frames, or crops, keeps.

        One number an item is read back from the device, in one go.
        """
        kept = self.kept_tokens()
        counts = []
        for numbers in self.vision.numbers():
            counts.append(kept[numbers].sum(dim=1))
        found: list[list[int]] = [[] for _ in self.vision.slots]
        owners = [image for owner in self.vision.owner for image in owner]
        for image, count in zip(owners, torch.cat(counts).tolist(), strict=True):
            found[image].append(count)
        return found

    def notes_per_image(self) -> list[dict[str, float]]:
        """Return for each image, or video, what the method noted of it by name: the mean over its items.

        An image of which nothing was noted, such as one that is kept whole, has none. All notes are read back from the
        device in one go; of a method that notes nothing, nothing is.
        """
        noted: list[Tensor] = []
        belongs: list[tuple[int, str]] = []  # the image and the name of each number
        for among, selection in zip(self.candidates, self.selections, strict=True):
            for name, values in selection.notes.items():
                noted.append(values.float())
                belongs += [(image, name) for image in among.images]
        by_name: list[dict[str, list[float]]] = [{} for _ in self.vision.slots]
        for (image, name), value in zip(belongs, torch.cat(noted).tolist() if noted else (), strict=True):
            by_name[image].setdefault(name, []).append(value)
        return [means(own) for own in by_name]

    def merged_tokens(self) -> tuple[Int[Tensor, " M"], Float[Tensor, "M C"]]:
        """Return where merged features stand and what they are: (M,) numbers and (M, C) pre-projector features."""
        # Of nothing at first, so that images of which none was merged still have a width to project.
        numbers = [self.vision.origin[0][:0]]
        features = [self.vision.groups[0].features[0, :0]]
        for among, selection in zip(self.candidates, self.selections, strict=True):
            for item, merged in enumerate(selection.merged or ()):
                numbers.append(among.numbers[item, selection.slots_of(item)])
                features.append(merged)
        return torch.cat(numbers), torch.cat(features)

    def mixed_tokens(self) -> tuple[Int[Tensor, " M"], Float[Tensor, "M D"]]:
        """Return where tokens merged after the projector stand and what they are: (M,) numbers and (M, D).

        The projected tokens carry the graph of the projector, and so do their mixtures.
        """
        numbers = [self.vision.origin[0][:0]]
        features = [self.vision.slots[0][:0]]
        for among, selection in zip(self.candidates, self.selections, strict=True):
            for item, weights in enumerate(selection.mixing or ()):
                projected = among.tokens.require("projected")[item]  # (N, D)
                # Item by item and in float32, so that neither the batch nor autocast decides the last bits.
                with exact_float32(projected.device):
                    mixed = weights @ projected.float()  # (K, D)
                numbers.append(among.numbers[item, selection.slots_of(item)])
                features.append(mixed.to(projected.dtype))
        return torch.cat(numbers), torch.cat(features)


@dataclass(frozen=True)
class Pruned:
    """Rewritten inputs, and what became of the images.

    Attributes:
        inputs: keyword arguments for the stock model.
        keep: (B, L) boolean over the full sequence, which of its positions are still there; padding counts as kept.
        chosen: what was kept of each modality: its images, the candidates and the selections.
        kept: for each modality how many visual tokens of each image reach the LLM, images in reading order.
        rows: for each modality the row of the batch that each image is in, in the same order.
        stored: the images, where they came from a feature cache; ``chosen`` is empty then.
    """

    inputs: dict[str, Any]
    keep: Bool[Tensor, "B L"]
    chosen: Mapping[str, Chosen] = field(default_factory=dict)
    kept: Mapping[str, list[int]] = field(default_factory=dict)
    rows: Mapping[str, list[int]] = field(default_factory=dict)
    stored: StoredImages | None = None

    @property
    def vision(self) -> dict[str, Vision]:
        """The encoded images, by modality."""
        return {modality: choice.vision for modality, choice in self.chosen.items()}

    @property
    def kept_per_frame(self) -> list[list[int]]:
        """For each video how many visual tokens of each of its frames reach the LLM; empty without videos."""
        return self.chosen["video"].kept_per_frame() if "video" in self.chosen else []

    @property
    def notes(self) -> dict[str, Tensor]:
        """What the method counted on the way, one float32 number per item by name, such as ``ran_dry``."""
        noted: dict[str, list[Tensor]] = {}
        for choice in self.chosen.values():
            for selection in choice.selections:
                for name, values in selection.notes.items():
                    noted.setdefault(name, []).append(values.float())
        for own in self.stored.notes if self.stored is not None else ():
            for name, value in own.items():
                noted.setdefault(name, []).append(torch.tensor([value]))
        return {name: torch.cat(values) for name, values in noted.items()}

    @property
    def notes_per_image(self) -> dict[str, list[dict[str, float]]]:
        """For each modality what the method noted of each image by name, the mean over its items, in reading order."""
        found = {modality: choice.notes_per_image() for modality, choice in self.chosen.items()}
        if self.stored is not None:
            found[self.stored.modality] = [dict(own) for own in self.stored.notes]
        return found

    @property
    def selections(self) -> dict[str, list[Selection]]:
        """What the pruner kept, by modality, one selection per group of candidates."""
        return {modality: choice.selections for modality, choice in self.chosen.items()}


def staying_slots(
    vision: Vision,
    kept: Bool[Tensor, " T"],
    newline: str,
) -> Bool[Tensor, " S"]:
    """Return which of all images' slots stay, (S,) boolean: those of kept tokens, and row ends by policy.

    With "rows" a row end stays if a token of its row does. An image of which nothing is dropped stays whole: a row of
    padding alone, which the model cuts down to its end, has no token that could hold it. With the origins
    ``[0, 1, -1, 2, 3, -1]``, -1 ending a row, and token 3 alone kept, "rows" gives
    ``[False, False, False, False, True, True]``.

    Args:
        vision: the images, S slots in all.
        kept: (T,) which tokens are kept.
        newline: "rows", "all" or "none".
    """
    origin = torch.cat(vision.origin)  # (S,)
    is_end = origin == NEWLINE  # (S,)
    stays = kept[origin.clamp(min=0)] & ~is_end  # a row end looks up token 0, and is taken out again
    if newline == "all":
        return stays | is_end
    if newline == "rows" and vision.row:
        return stays | (is_end & _row_is_held(vision, stays, is_end))
    return stays


def _row_is_held(
    vision: Vision,
    stays: Bool[Tensor, " S"],
    is_end: Bool[Tensor, " S"],
) -> Bool[Tensor, " S"]:
    """Return for every slot whether a token of its row stays, or its image loses no token at all, (S,)."""
    lengths = torch.tensor(vision.lengths, device=stays.device)
    # The output's size is said, or it would be read back from the device.
    image = torch.arange(len(lengths), device=stays.device).repeat_interleave(lengths, output_size=len(stays))
    row = torch.cat(vision.row)  # (S,)
    # Rows of all images in one vector: no image has more rows than slots, and its cell 0 is that of no row.
    cells = max(vision.lengths) + 1
    cell = image * cells + row + 1  # (S,)
    in_row = torch.zeros(len(lengths) * cells, dtype=torch.long, device=stays.device)
    in_row = in_row.index_add(0, cell, stays.long())  # (cells of all images,), how many tokens of each row stay
    is_dropped = ~stays & ~is_end
    dropped = torch.zeros_like(lengths).index_add(0, image, is_dropped.long())
    row_has_token = (in_row[cell] > 0) & (row >= 0)
    image_is_whole = dropped[image] == 0
    return row_has_token | image_is_whole


def slot_features(
    vision: Vision,
    stays: Bool[Tensor, " S"],
    merged: tuple[Int[Tensor, " M"], Float[Tensor, "M C"]] | None,
    project: Callable[[Tensor], Tensor],
    mixed: tuple[Int[Tensor, " M2"], Float[Tensor, "M2 D"]] | None = None,
    project_kept: bool = False,
) -> Float[Tensor, "K D"]:
    """Return the features (K, D) of all staying slots.

    Merged tokens stand in the slots they were made around, in every family; those that were made around none, such as
    [CLS], stand in a slot that is free. Of slots with the origins ``[0, 1, 2]`` of which the first and the last stay, a
    merged token 2 gives ``[slot 0, projected token 2]``.

    Args:
        vision: the images, S slots in all.
        stays: (S,) which slots stay.
        merged: numbers (M,) and pre-projector features (M, C) of merged tokens; None for a method that never merges.
        project: from pre-projector features to the LLM's space.
        mixed: numbers (M2,) and features (M2, D) of tokens that were merged in the LLM's space.
        project_kept: whether slots hold no projected tokens yet, and those of the slots that stay are projected here.
    """
    plain = torch.cat(vision.slots)[stays]  # (K, D)
    if project_kept:
        behind = torch.cat(vision.origin)[stays]  # (K,)
        projected = project(vision.features()[behind.clamp(min=0)])
        plain = torch.where((behind == NEWLINE)[:, None], plain, projected)
    if merged is None:
        return plain
    numbers, features = merged
    projected = project(features)  # in one call, also of nothing: under ZeRO-3 all ranks call it equally often
    if mixed is not None:
        numbers = torch.cat([numbers, mixed[0]])
        projected = torch.cat([projected, mixed[1]])
    if not len(numbers):
        return plain
    # Two look-ups instead of a loop: from a slot to its token, and from a token to its merged features, if it has any.
    order = torch.arange(len(numbers), device=numbers.device)
    nothing = torch.full((vision.total,), -1, device=numbers.device)
    merged_of = nothing.index_copy(0, numbers, order)  # (T,)
    origin = torch.cat(vision.origin)[stays]  # (K,)
    source = torch.where(origin == NEWLINE, -1, merged_of[origin.clamp(min=0)])
    is_merged = (source >= 0)[:, None]
    return torch.where(is_merged, projected[source.clamp(min=0)], plain)


@dataclass(frozen=True)
class Staying:
    """What of one modality of a batch reaches the LLM.

    Attributes:
        slots: (S,) which slots of all images stay.
        lengths: how many slots each image has.
        features: (K, D) what stands in those that stay.
        levels: for models with deepstack features, per level (K, D).
    """

    slots: Bool[Tensor, " S"]
    lengths: list[int]
    features: Float[Tensor, "K D"]
    levels: Sequence[Float[Tensor, "K D"]] = ()


def staying(
    choice: Chosen, newline: str, merges: bool, project: Callable[[Tensor], Tensor], project_kept: bool = False
) -> Staying:
    """Return what of a choice reaches the LLM.

    Args:
        choice: of one modality.
        newline: which row ends stay.
        merges: whether the method may return merged features.
        project: from pre-projector features to the LLM's space.
        project_kept: whether the images are not projected yet.
    """
    vision = choice.vision
    slots = staying_slots(vision, choice.kept_tokens(), newline)
    merged, mixed = None, None
    if merges:
        merged, mixed = choice.merged_tokens(), choice.mixed_tokens()
    features = slot_features(vision, slots, merged, project, mixed, project_kept)
    return Staying(slots, vision.lengths, features, [torch.cat(level)[slots] for level in vision.levels])


def rewrite(
    model: nn.Module,
    family: Family,
    inputs: Mapping[str, Any],
    chosen: Mapping[str, Chosen],
    placeholders_at: Mapping[str, Int[Tensor, "S 2"]],
    newline: str,
    position_policy: str,
    padding_side: str,
    merges: bool,
    project_kept: bool = False,
    stored: StoredImages | None = None,
    projected: Float[Tensor, "K D"] | None = None,
) -> Pruned:
    """Shorten a batch to what was chosen, and put the kept features where the stock model takes them.

    A row ``<s> i i i i Q </s>`` of whose image the first and the third token are chosen becomes ``<s> i i Q </s>``, its
    ``keep`` ``[1, 1, 0, 1, 0, 1, 1]``, and ``mm_encoder_outputs`` hold features (2, D) for it.

    Args:
        model: the stock model.
        family: its family.
        inputs: the full batch.
        chosen: per modality.
        placeholders_at: per modality the row and column (S, 2) of all placeholders, in reading order.
        newline: which row ends stay.
        position_policy: "compact" or "original".
        padding_side: where the shortened rows are padded.
        merges: whether the method may return merged features.
        project_kept: whether the images are not projected yet.
        stored: images of a feature cache, which were chosen from before.
        projected: what stands in their slots that stay, (K, D).
    """
    project = partial(family.project, model)
    parts: dict[str, Staying] = {}
    for modality, choice in chosen.items():
        parts[modality] = staying(choice, newline, merges, project, project_kept)
    if stored is not None and projected is not None:
        parts[stored.modality] = Staying(stored.stays, list(stored.lengths), projected)
    keep = torch.ones_like(inputs["input_ids"], dtype=torch.bool)  # (B, L)
    outputs: dict[str, PrunedOutput] = {}
    counts: dict[str, list[int]] = {}
    for modality, part in parts.items():
        row, column = placeholders_at[modality].unbind(dim=1)  # (S,) each
        keep[row, column] = part.slots
        counts[modality] = _per_image(part.slots, part.lengths)
        levels = [list(level.split(counts[modality])) for level in part.levels]
        output = family.put_back(list(part.features.split(counts[modality])), levels, modality)
        if isinstance(output.pooler_output, Tensor):
            output.pooler_output = in_blocks(output.pooler_output, counts[modality])
        outputs[modality] = output
    positions = family.positions(model, inputs) if position_policy == "original" else None
    result = shorten(inputs, keep, positions, padding_side, family.aligned, family.first_position)
    # With pixels among its inputs the model would encode the images again, unpruned.
    for name in (*family.pixels.values(), *family.replaced, *family.left_out()):
        result.pop(name, None)
    if outputs:
        result["mm_encoder_outputs"] = outputs
    return Pruned(result, keep, dict(chosen), counts, stored=stored)


def in_blocks(
    features: Shaped[Tensor, "*_items D"],
    counts: Sequence[int],
) -> Float[Tensor, "blocks G D"]:
    """Return the features of all images as blocks of G tokens, none of which holds tokens of two images.

    Models that take one tensor scatter its tokens in order and do not look at its shape. Stock generation does, where
    it repeats a row's images for its beams: it counts the blocks of each row. G is the largest number that divides all
    counts, so images with as many tokens each are (images, K, D), and of 4 and 6 tokens there are five blocks of 2.

    Args:
        features: of K tokens in all, (K, D) or with more axes.
        counts: how many of them each image has.
    """
    size = math.gcd(*counts) or 1  # 0 where nothing is left of any image
    return features.reshape(-1, size, features.shape[-1])


def _per_image(
    stays: Bool[Tensor, " S"],
    lengths: list[int],
) -> list[int]:
    """Return how many slots of each image stay: ``[True, False, True, True]`` with lengths ``[2, 2]`` gives ``[1, 2]``.

    One number an image is read back from the device, in one go.
    """
    ends = torch.tensor(lengths, device=stays.device).cumsum(0)  # (images,)
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


def check_aligned(inputs: Mapping[str, Any], family: Family) -> None:
    """Check that a batch with images has what the family's model reads beside ids and mask.

    Raises:
        PruningError: naming what is missing; without it the model runs, and gives other answers.
    """
    for name in family.aligned:
        if inputs.get(name) is None:
            raise PruningError(
                f"family {family.name!r} reads {name!r} (B, L), and this batch with images has none: the model would "
                "run with another attention mask; pass what the processor returns"
            )
