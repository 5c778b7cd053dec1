"""Choosing anew from images of a feature cache of which all tokens are stored: what such an image is to a pruner.

Methods that choose by the projector's output keep other tokens once it is tuned, so what they keep can't be stored
while it trains. What they choose from can: where they read nothing but features, projected tokens and the instruction,
all tokens of an image are read from the cache and projected, and the pruner chooses from them as it would from pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunetune.pruning.errors import PruningError
from prunetune.pruning.rewrite import Chosen, gathered_notes
from prunetune.pruning.signals import of_source
from prunetune.pruning.stored import StoredImages
from prunetune.pruning.types import Pruner, VisualTokens
from prunetune.pruning.vision import Vision


def why_not_live(name: str, pruner: Pruner, merges: bool, sees_clips: bool) -> str | None:
    """Return why a method can't choose from stored features; None if it can."""
    read = sorted(set(pruner.needs) - set(of_source(pruner.needs, "text")))
    if read:
        return f"{name} reads {', '.join(read)} of the vision tower, which a feature cache does not hold"
    if merges:
        return f"{name} merges tokens"
    return f"{name} compares the frames of videos" if sees_clips else None


def check_can_choose(stored: StoredImages, images: Sequence[int]) -> None:
    """Check that these images can be chosen from anew; raises PruningError."""
    if not images:
        return
    known = not len(stored.ends) and len(stored.items) == len(stored.lengths)
    if known and all(stored.items[number][0] for number in images):
        return
    raise PruningError(
        "no method can choose anew from these stored images: they are cut into crops or have row ends, or their cache "
        "is of an earlier release; choose with the original projector (pruning.choose_with), or run without features"
    )


def live_vision(
    stored: StoredImages, projected: Float[Tensor, "K D"], images: Sequence[int], rows: Sequence[int]
) -> tuple[Vision, list[int]]:
    """Return some stored images as the family would encode them, and the row of each; every tile counts as an image.

    Args:
        stored: the batch, with all tokens of these images.
        projected: (K, D) what stands in all staying slots of the batch.
        images: the numbers of the images.
        rows: the row of each image of the batch.
    """
    ends = _ends(stored.stays, stored.lengths)
    groups: dict[tuple[int, int, int], list[tuple[Tensor, Tensor]]] = {}
    owners: dict[tuple[int, int, int], list[int]] = {}
    row_of: list[int] = []
    for number in images:
        count, high, wide = stored.items[number]
        last, length = ends[number], stored.lengths[number]
        own = slice(last - length, last)
        kind = (length // count, high, wide)
        for features, after in zip(stored.rows[own].chunk(count), projected[own].chunk(count), strict=True):
            groups.setdefault(kind, []).append((features, after))
            owners.setdefault(kind, []).append(len(row_of))
            row_of.append(rows[number])
    slots: list[Tensor] = [projected[:0]] * len(row_of)
    origin: list[Tensor] = [stored.stays[:0]] * len(row_of)
    made = []
    first = 0
    for (count, high, wide), tiles in groups.items():
        grid = (high, wide) if high else None
        features, after = (torch.stack(parts) for parts in zip(*tiles, strict=True))
        made.append(VisualTokens(features, after, grid=grid))
        for place, tile in zip(owners[(count, high, wide)], after, strict=True):
            slots[place] = tile
            origin[place] = torch.arange(first, first + count, device=tile.device)
            first += count
    owner = tuple(tuple(places) for places in owners.values())
    return Vision(stored.modality, tuple(made), owner, tuple(slots), tuple(origin)), row_of


def chosen_anew(stored: StoredImages, chosen: Sequence[tuple[Sequence[int], Chosen]]) -> StoredImages:
    """Return a batch of which fewer slots of some images stay.

    Args:
        stored: the batch, with all tokens of these images.
        chosen: what was chosen of which images.
    """
    starts = [0]
    for length in stored.lengths:
        starts.append(starts[-1] + length)
    stays, notes = stored.stays.clone(), list(stored.notes)
    for images, choice in chosen:
        kept = _slots(choice).split([stored.lengths[number] for number in images])
        noted = choice.notes_per_image()
        for number, own in zip(images, kept, strict=True):
            stays[starts[number] : starts[number + 1]] = own
            tiles = stored.items[number][0]
            notes[number], noted = gathered_notes(noted[:tiles]), noted[tiles:]
    return replace(stored, stays=stays, notes=tuple(notes))


def _slots(choice: Chosen) -> Bool[Tensor, " S"]:
    """Return which slots stay, image after image: without row ends every slot is a token."""
    return choice.kept_tokens()[torch.cat(choice.vision.origin)]


def _ends(stays: Bool[Tensor, " S"], lengths: Sequence[int]) -> list[int]:
    """Return behind which of the staying slots each image ends; one number an image is read back from the device."""
    last = torch.tensor(lengths, device=stays.device).cumsum(dim=0)
    return stays.long().cumsum(dim=0)[last - 1].tolist()
