"""Crops of which the model merges and interpolates some: of very large images it makes a smaller grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from prunetune.pruning.families.anyres import origin_of, owner_of, row_ends_of, rows_of
from prunetune.pruning.families.tower import per_llm_token
from prunetune.pruning.signals import signal_of
from prunetune.pruning.types import VisualTokens
from prunetune.pruning.vision import NEWLINE, Vision

NO_LIMIT = "anyres_max_1000000000"
"""The aspect ratio of a model that interpolates no grid, however large."""


@dataclass(frozen=True)
class Packing:
    """The model's own packing of the crops of some images, which interpolates grids that are too large.

    Attributes:
        model: the stock model.
        crops: how many each image has.
        sizes: (images, 2) height and width.
    """

    model: nn.Module
    crops: tuple[int, ...]
    sizes: Int[Tensor, "images 2"]

    def pack(self, values: Sequence[Tensor], newline: Tensor) -> list[Tensor]:
        """Return each image's values (L, C) of its crops' (k, N, C), those of row ends included."""
        config: Any = self.model.config
        return self._packed(values, newline, config.vision_aspect_ratio)

    def unlimited(self, values: Sequence[Tensor], newline: Tensor) -> list[Tensor]:
        """Return the same for a model that interpolates nothing."""
        return self._packed(values, newline, NO_LIMIT)

    def _packed(self, values: Sequence[Tensor], newline: Tensor, aspect: str) -> list[Tensor]:
        base: Any = self.model.base_model
        return base.pack_image_features(values, self.sizes, image_newline=newline, vision_aspect_ratio=aspect)[0]

    def tokens(
        self,
        values: Float[Tensor, "crops N C"],
        ends: Sequence[Bool[Tensor, " _L"]],
        images: Sequence[int],
    ) -> Float[Tensor, "images T C"]:
        """Return the values of some equally long images, interpolated as the model does, without row ends."""
        packed = self.pack(values.split(self.crops), values.new_zeros(values.shape[-1]))
        return torch.stack([packed[image][~ends[image]] for image in images])


@dataclass(frozen=True)
class Layout:
    """What a pruner sees of the images of a packing: crops, or an image's interpolated tokens as one item.

    Attributes:
        whole: the images that are not interpolated.
        resized: those that are, in groups with equally many tokens.
        ends: for each image (L,) which slots end a row.
        count: tokens of a crop.
    """

    whole: tuple[int, ...]
    resized: tuple[tuple[int, ...], ...]
    ends: tuple[Bool[Tensor, " _L"], ...]
    count: int

    @staticmethod
    def of(packing: Packing, crops: Float[Tensor, "crops N D"]) -> Layout:
        """Return the layout of images with these crops."""
        ends = row_ends_of(packing.pack, packing.crops, crops)
        unlimited = row_ends_of(packing.unlimited, packing.crops, crops)
        whole: list[int] = []
        resized: dict[int, list[int]] = {}
        for image, (own, full) in enumerate(zip(ends, unlimited, strict=True)):
            if len(own) == len(full):  # interpolation makes a grid smaller, always
                whole.append(image)
            else:
                resized.setdefault(int((~own).sum()), []).append(image)
        groups = tuple(tuple(images) for images in resized.values())
        return Layout(tuple(whole), groups, tuple(ends), crops.shape[1])

    def crops_of_whole(self, packing: Packing) -> list[int]:
        """Return the crops of the images that are not interpolated."""
        owner = owner_of(packing.crops)
        return [crop for crop, image in enumerate(owner) if image in self.whole]

    def projected(
        self,
        packing: Packing,
        crops: Float[Tensor, "crops N D"],
        slots: Sequence[Float[Tensor, "_L D"]],
    ) -> list[Tensor]:
        """Return the projected tokens of every group, of projected crops and of the slots that were made of them."""
        groups = [crops[self.crops_of_whole(packing)]] if self.whole else []
        for images in self.resized:
            groups.append(torch.stack([slots[image][~self.ends[image]] for image in images]))
        return groups


def of_crops(packing: Packing, tokens: VisualTokens, slots: Sequence[Float[Tensor, "_L D"]]) -> Vision:
    """Return images as their crops, and those that the model interpolates as one item each.

    Args:
        packing: the images.
        tokens: (crops, N) all crops.
        slots: for each image the features of its placeholders.
    """
    assert tokens.projected is not None  # every family fills it
    layout = Layout.of(packing, tokens.projected)
    projected = layout.projected(packing, tokens.projected, slots)
    device = tokens.features.device
    owner = owner_of(packing.crops)
    groups, owners = [], []
    origin: dict[int, Tensor] = {}
    numbered = 0
    if layout.whole:
        crops = layout.crops_of_whole(packing)
        groups.append(_crops_at(tokens, crops))
        owners.append(tuple(owner[crop] for crop in crops))
        # Crops of other images are numbered 0, and nobody looks at them.
        numbers = torch.zeros(len(owner), layout.count, dtype=torch.long, device=device)
        numbers[crops] = torch.arange(len(crops) * layout.count, device=device).view(-1, layout.count)
        packed = origin_of(packing.unlimited, packing.crops, numbers)
        origin |= {image: packed[image] for image in layout.whole}
        numbered = len(crops) * layout.count
    for images, own in zip(layout.resized, projected[len(groups) :], strict=True):
        groups.append(_resized(packing, layout, tokens, images, own))
        owners.append(images)
        for image in images:
            origin[image] = torch.full(layout.ends[image].shape, NEWLINE, device=device)
            origin[image][~layout.ends[image]] = torch.arange(numbered, numbered + own.shape[1], device=device)
            numbered += own.shape[1]
    sources = {}
    if layout.resized:
        sizes = packing.sizes
        sources = {"patches": tokens.features, "sizes": sizes, "crops": torch.tensor(packing.crops, device=device)}
    return Vision(
        modality="image",
        groups=tuple(groups),
        owner=tuple(owners),
        slots=tuple(slots),
        origin=tuple(origin[image] for image in range(len(slots))),
        row=tuple(rows_of(ends, layout.count) for ends in layout.ends),
        sources=sources,
    )


def _crops_at(tokens: VisualTokens, crops: Sequence[int]) -> VisualTokens:
    """Return some of the items."""
    if len(crops) == len(tokens.features):
        return tokens
    return tokens.map(lambda values: values[list(crops)])


def _resized(
    packing: Packing,
    layout: Layout,
    tokens: VisualTokens,
    images: Sequence[int],
    projected: Float[Tensor, "images T D"],
) -> VisualTokens:
    """Return equally large interpolated images as one item each, whose tokens are those of the base view and the grid.

    What belongs to an item as a whole is that of the base view.
    """

    def interpolated(values: Float[Tensor, "crops N C"]) -> Float[Tensor, "images T C"]:
        return packing.tokens(values, layout.ends, images)

    owner = owner_of(packing.crops)
    base_views = [owner.index(image) for image in images]
    signals = per_llm_token(tokens.signals, interpolated)
    for name, values in signals.items():
        if not signal_of(name).per_token:
            signals[name] = values[base_views]
    config: Any = packing.model.config
    return VisualTokens(
        interpolated(tokens.features),
        projected,
        signals=signals,
        layers=tokens.layers,
        no_grid=f"the model interpolates what exceeds its vision_aspect_ratio {config.vision_aspect_ratio!r}",
    )
