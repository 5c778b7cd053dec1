"""What pruners keep of encoded images, before the projector: the union over all of them, and an index list for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.models.errors import FeatureError
from prunetune.pruning import Family, PrunedModel, Vision
from prunetune.pruning.budget import Budget
from prunetune.pruning.rewrite import Chosen, gathered_notes, slot_features, staying_slots
from prunetune.pruning.vision import NEWLINE


@dataclass(frozen=True)
class KeptOf:
    """What one pruner and budget keeps of an image.

    Attributes:
        at: (K,) the slots that stay, ascending, on the CPU.
        source: (K,) the row of the image's stored features that stands in each, -1 for a row end.
        notes: what the method noted of the image by name.
    """

    at: Tensor
    source: Tensor
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class KeptImage:
    """What is stored of an image.

    Attributes:
        length: how many placeholders it has.
        rows: (R, C) pre-projector features: the slots that any choice keeps in order, then what was merged.
        choices: one for each pruner and budget.
        items: of how many items alike its placeholders are, token by token; 0 where they are not.
        grid: rows and columns of such an item; zeros where its tokens form no grid.
    """

    length: int
    rows: Tensor
    choices: list[KeptOf]
    items: int = 0
    grid: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class KeptSlots:
    """What one choice keeps of all images of a batch: (S,) which slots, and (K, C) what stands in them, on the CPU."""

    stays: Tensor
    placed: Tensor
    notes: list[dict[str, float]]


def choose_before_projector(
    pruned: PrunedModel,
    vision: Vision,
    instructions: Sequence[str],
    rows: Sequence[int],
    keep: Budget,
    names: Mapping[int, str],
) -> tuple[Chosen, bool]:
    """Return what is kept, and whether that depends on the projector.

    The pruner is asked without the projected tokens first: what it can choose without them does not depend on them,
    whatever it says that it needs.
    """
    try:
        return pruned.choose(vision.unprojected(), instructions, rows, keep=keep, names=names), False
    # Of any kind: a method from outside may read the field itself. A mistake of the user's comes again below.
    except Exception:
        return pruned.choose(vision, instructions, rows, keep=keep, names=names), True


def kept_slots(choice: Chosen, vision: Vision, pruner: str, newline: str, merges: bool) -> KeptSlots:
    """Return what a choice keeps of a batch.

    Args:
        choice: what the pruner answered.
        vision: the images.
        pruner: its name, for messages.
        newline: which row ends stay.
        merges: whether the method may return merged features.

    Raises:
        FeatureError: for a method that merges behind the projector.
    """
    if any(selection.mixing is not None for selection in choice.selections):
        raise FeatureError(
            f"{pruner} merges tokens behind the projector, all of which would have to be projected again; its features "
            "can't be made before: train without features"
        )
    before = replace(choice, vision=_before_projector(vision))
    stays = staying_slots(before.vision, before.kept_tokens(), newline)
    merged = before.merged_tokens() if merges else None
    # The same code as on the way to the LLM, but for the projector: merged tokens stand where they stand there.
    placed = slot_features(before.vision, stays, merged, _as_they_are)
    return KeptSlots(stays.cpu(), placed.cpu(), choice.notes_per_image())


def kept_images(vision: Vision, choices: Sequence[KeptSlots]) -> list[KeptImage]:
    """Return what is stored of each image of a batch."""
    before = _before_projector(vision)
    slots = [features.cpu() for features in before.slots]
    origin = [numbers.cpu() for numbers in vision.origin]
    parts = [choice.stays.split(vision.lengths) for choice in choices]
    placed = []
    for choice, stays in zip(choices, parts, strict=True):
        placed.append(choice.placed.split([int(own.sum()) for own in stays]))
    grids = _grids(vision)
    images = []
    for image, features in enumerate(slots):
        is_end = origin[image] == NEWLINE
        own = [(stays[image], features_of[image]) for stays, features_of in zip(parts, placed, strict=True)]
        notes = [choice.notes[image] for choice in choices]
        kept = _kept_image(features, is_end, own, notes)
        images.append(replace(kept, items=1, grid=grids[image]) if image in grids else kept)
    return images


def _grids(vision: Vision) -> dict[int, tuple[int, int]]:
    """Return the grid of each image that is one item whose tokens fill its slots in their order."""
    found: dict[int, tuple[int, int]] = {}
    if vision.row:  # row ends stay by rows, which are not stored
        return found
    for group, numbers, owner in zip(vision.groups, vision.numbers(), vision.owner, strict=True):
        for item, image in enumerate(owner):
            if owner.count(image) == 1 and torch.equal(vision.origin[image], numbers[item]):
                found[image] = group.grid or (0, 0)
    return found


def _kept_image(
    features: Tensor, is_end: Tensor, own: Sequence[tuple[Tensor, Tensor]], notes: Sequence[Mapping[str, float]]
) -> KeptImage:
    """Return the union of what all choices keep of an image, and where each finds its own in it.

    Args:
        features: (L, C) of all slots.
        is_end: (L,) which of them are row ends.
        own: for each choice which slots stay, (L,), and what stands in them, (K, C).
        notes: for each choice.
    """
    found = []
    union = torch.zeros(len(features), dtype=torch.bool)
    for stays, placed in own:
        at = stays.nonzero()[:, 0]
        # What differs from the slot's own features was merged; what equals them need not be stored twice.
        is_merged = (placed != features[at]).any(dim=1) & ~is_end[at]
        union[at[~is_merged & ~is_end[at]]] = True
        found.append((at, placed, is_merged))
    row_of = torch.where(union, union.long().cumsum(dim=0) - 1, -1)
    rows, choices = [features[union]], []
    first = int(union.sum())
    for (at, placed, is_merged), noted in zip(found, notes, strict=True):
        source = torch.where(is_end[at], -1, row_of[at])
        merged = placed[is_merged]
        source[is_merged] = torch.arange(first, first + len(merged))
        rows.append(merged)
        first += len(merged)
        choices.append(KeptOf(at, source, noted))
    return KeptImage(len(features), torch.cat(rows), choices)


def joined(images: Sequence[KeptImage]) -> KeptImage:
    """Return the tiles of one sample's image, each of which a family counts as an image, as one."""
    if len(images) == 1:
        return images[0]
    slots, rows = 0, 0
    parts: list[list[KeptOf]] = [[] for _ in images[0].choices]
    for image in images:
        for number, choice in enumerate(image.choices):
            source = torch.where(choice.source < 0, -1, choice.source + rows)
            parts[number].append(KeptOf(choice.at + slots, source, choice.notes))
        slots += image.length
        rows += len(image.rows)
    choices = []
    for own in parts:
        at, source = torch.cat([part.at for part in own]), torch.cat([part.source for part in own])
        choices.append(KeptOf(at, source, gathered_notes(part.notes for part in own)))
    alike = all(image.items and (image.length, image.grid) == (images[0].length, images[0].grid) for image in images)
    rows_of_all = torch.cat([image.rows for image in images])
    return KeptImage(slots, rows_of_all, choices, len(images) if alike else 0, images[0].grid if alike else (0, 0))


def newline_of(vision: Vision) -> Tensor | None:
    """Return what stands in the row ends of a batch, (D,); None if there are none."""
    ends = torch.cat(vision.slots)[torch.cat(vision.origin) == NEWLINE]
    return ends[0].cpu() if len(ends) else None


def check_can_be_stored(model: nn.Module, family: Family, visions: Mapping[str, Vision]) -> Vision:
    """Return the images of a batch, if slots are projections of single tokens, which alone can be stored before it.

    Args:
        model: the stock model.
        family: its family.
        visions: what it made of a batch.

    Raises:
        FeatureError: naming the family and why not.
    """
    why = _why_not(model, family, visions)
    if why is not None:
        raise FeatureError(f"features of family {family.name!r} can't be stored: {why}; train without features")
    return visions["image"]


def _why_not(model: nn.Module, family: Family, visions: Mapping[str, Vision]) -> str | None:
    if family.unproven:
        return "every run compares the model with the stock one first, which takes pixels"
    if set(visions) != {"image"}:
        return "those of videos are not, only of images"
    vision = visions["image"]
    if vision.levels:
        return "it has deepstack levels"
    if vision.sources:
        return "it pools behind the projector"
    return _why_not_projected(model, family, vision)


def _why_not_projected(model: nn.Module, family: Family, vision: Vision, most: int = 64) -> str | None:
    """Return why slots are not their tokens after the projector, looking at ``most`` of them; None if they are."""
    slots, origin = torch.cat(vision.slots), torch.cat(vision.origin)
    is_token = origin != NEWLINE
    ends = slots[~is_token]
    if len(ends) and not torch.equal(ends, ends[:1].expand_as(ends)):
        return "its row ends differ"
    tokens = vision.features()[origin[is_token][:most]]
    projected, expected = family.project(model, tokens).float(), slots[is_token][:most].float()
    # Half precision rounds a product of other rows otherwise, by some of its last bits.
    tolerance = 1e-4 if slots.dtype == torch.float32 else 3e-2
    if not torch.allclose(projected, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
        return "what reaches the LLM is more than the projection of a token"
    return None


def _before_projector(vision: Vision) -> Vision:
    """Return the same images with what enters the projector in their slots, and zeros in row ends."""
    tokens = vision.features()  # (T, C)
    slots = []
    for origin in vision.origin:
        own = tokens[origin.clamp(min=0)]
        slots.append(own.masked_fill((origin == NEWLINE)[:, None], 0))
    return replace(vision, slots=tuple(slots), levels=())


def _as_they_are(features: Any) -> Any:
    return features
