"""The pictures that the vision tower saw, laid out: tiles at their place, frames in rows, tokens over each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prunetune.data_recipes.images import Album
from prunetune.data_recipes.pixels import mean_color
from prunetune.data_recipes.videos import Clip, squared
from prunetune.evaluation.errors import TaskError
from prunetune.models import Arm
from prunetune.pruning.families.tiling import WHOLE, Tiling
from prunetune.pruning.vision import Vision

_GAP = 8.0
_ACROSS = 4
"""Frames in a row, at most."""


@dataclass(frozen=True)
class View:
    """A picture with its tokens, and where it lies on its sheet.

    Attributes:
        name: what it is, for people: "frame 3", "tile 1, 2"; empty where there is nothing to tell apart.
        pixels: (H, W, 3), 8 bits, as the tower saw it.
        grid: rows and columns of tokens.
        numbers: (rows * columns,) the number of each token of its ``Vision``, in raster order.
        left: of the picture on the sheet, in points.
        top: likewise.
        width: likewise.
        height: likewise.
    """

    name: str
    pixels: np.ndarray
    grid: tuple[int, int]
    numbers: np.ndarray
    left: float = 0.0
    top: float = 0.0
    width: float = 0.0
    height: float = 0.0

    def boxes(self) -> list[tuple[int, float, float, float, float]]:
        """Return for each token its number, and left, top, width and height of its patch on the sheet."""
        rows, columns = self.grid
        wide, high = self.width / columns, self.height / rows
        found = []
        for place, number in enumerate(self.numbers.tolist()):
            row, column = divmod(place, columns)
            found.append((number, self.left + column * wide, self.top + row * high, wide, high))
        return found


@dataclass(frozen=True)
class Sheet:
    """All views of an image or video, laid out.

    Attributes:
        views: in reading order.
        width: in points.
        height: in points.
    """

    views: tuple[View, ...]
    width: float
    height: float


def sheet_of(arm: Arm, inputs: Mapping[str, Any], vision: Vision, opened: Any, name: str) -> Sheet:
    """Return what the tower saw of one prompt's image, images or video.

    Args:
        arm: any of the model.
        inputs: the processor's, of one prompt.
        vision: the same encoded.
        opened: the image, the ``Album`` of several or the ``Clip``, as the formatter was given it.
        name: of the sample, for messages.

    Raises:
        TaskError: in one line, where tokens form no grid, or do not belong to a part of the picture.
    """
    opened = _squared(arm, opened)
    items = _items(vision)
    for tokens in vision.groups:
        if tokens.grid is None:
            why = tokens.no_grid or "the visual tokens of this model form no grid"
            raise TaskError(f"{name}: {why}, so they can't be drawn over the image; choose another image or model")
    pictures = _pictures(arm, inputs, vision, opened, [len(own) for own in items])
    flat = [view for own in items for view in own]
    if len(pictures) != len(flat):
        raise TaskError(
            f"{name}: the model has {len(flat)} crops or frames of it, and its processor made {len(pictures)}, so that "
            "nobody knows which is where; choose another image or model"
        )
    views = [replace(view, pixels=pixels) for view, pixels in zip(flat, pictures, strict=True)]
    if vision.modality == "video":
        return _in_rows([replace(view, name=f"frame {number}") for number, view in enumerate(views, start=1)])
    sizes = [(image.height, image.width) for image in _images(opened)]
    tilings = arm.pruned.family.tilings(arm.model, arm.processor, inputs, sizes)
    if tilings is None:
        tilings = [WHOLE] * len(views)
    if sum(tiling.count for tiling in tilings) != len(views):
        told = " and ".join(f"{tiling.rows} x {tiling.columns}" for tiling in tilings)
        raise TaskError(
            f"{name}: {len(views)} crops are no {told} tiles with a view of the whole, so nobody knows which is where; "
            "choose another image or model"
        )
    return _sheet(views, tilings)


def _items(vision: Vision) -> list[list[View]]:
    """Return for each image or video its items, without their pictures."""
    found: list[list[View]] = [[] for _ in vision.slots]
    nothing = np.zeros((1, 1, 3), dtype=np.uint8)
    for tokens, numbers, owner in zip(vision.groups, vision.numbers(), vision.owner, strict=True):
        for own, image in zip(numbers.cpu().numpy(), owner, strict=True):
            found[image].append(View("", nothing, tokens.grid or (1, len(own)), own))
    return found


def _images(opened: Any) -> Sequence[Image.Image]:
    if isinstance(opened, Clip):
        return opened.frames
    return opened.images if isinstance(opened, Album) else [opened]


def _squared(arm: Arm, opened: Any) -> Any:
    """Return pictures padded as the formatter pads them."""
    return squared(opened, mean_color(arm.processor)) if arm.base.config.square == "pad" else opened


def _pictures(
    arm: Arm, inputs: Mapping[str, Any], vision: Vision, opened: Any, counts: Sequence[int]
) -> list[np.ndarray]:
    """Return the picture of every item, as the tower saw it."""
    pixels = arm.pruned.family.renamed(inputs)[arm.pruned.family.pixels[vision.modality]]
    if pixels.ndim >= 4:
        processor: Any = arm.processor
        if vision.modality == "video":
            processor = getattr(processor, "video_processor", None) or processor.image_processor
        else:
            processor = processor.image_processor
        return [_seen(one, processor) for one in _flat(pixels, counts)]
    # Patches in a list, at native resolution: such a model sees whole pictures, only resized.
    images = [np.asarray(image.convert("RGB")) for image in _images(opened)]
    if vision.modality == "video":
        frames = sum(counts)
        step = math.ceil(len(images) / frames)  # a token may span several frames, of which the first is shown
        images = [images[min(number * step, len(images) - 1)] for number in range(frames)]
    return images


def _flat(pixels: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Return (3, H, W) of every item; crops that pad an image to the number of another's are left out."""
    if pixels.ndim == 5 and len(pixels) == len(counts):
        return [crop for image, count in zip(pixels, counts, strict=True) for crop in image[:count]]
    return list(pixels.reshape(-1, *pixels.shape[-3:]))


def _seen(pixels: Tensor, processor: Any) -> np.ndarray:
    """Return normalised pixels (3, H, W) as a picture (H, W, 3)."""
    # Not the file's image: the processor may have cropped or padded it, and the grid lies over what was left.
    image = pixels.float().cpu()
    if getattr(processor, "do_normalize", True) and processor.image_mean is not None:
        mean = torch.tensor(processor.image_mean)[:, None, None]
        deviation = torch.tensor(processor.image_std)[:, None, None]
        image = image * deviation + mean
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


# ---- where they lie --------------------------------------------------------------------------------------------------


def _sheet(views: list[View], tilings: Sequence[Tiling]) -> Sheet:
    """Return pictures side by side, each with its tiles joined and the view of the whole before them."""
    placed: list[View] = []
    left = height = 0.0
    for tiling in tilings:
        own, views = views[: tiling.count], views[tiling.count :]
        if left:
            left += 2 * _GAP
        if tiling.whole is not None:
            whole = replace(own[tiling.whole], name="whole image")
            placed.append(_at(whole, left, 0.0, _longest(whole, 168.0)))
            left += placed[-1].width + _GAP
            height = max(height, placed[-1].height)
        tiles = [own[number] for number in tiling.tiles()]
        several = len(tiles) > 1
        for number, tile in enumerate(tiles):
            row, column = divmod(number, tiling.columns)
            longest = _longest(tile, 108.0) if several else _longest(tile, 184.0)
            told = f"tile {row + 1}, {column + 1}" if several else ("" if len(tilings) == 1 else "image")
            sized = _at(replace(tile, name=told), 0.0, 0.0, longest)
            placed.append(replace(sized, left=left + column * sized.width, top=row * sized.height))
        left += tiling.columns * sized.width
        height = max(height, tiling.rows * sized.height)
    return Sheet(tuple(placed), left, height)


def _in_rows(views: list[View]) -> Sheet:
    """Return frames in rows."""
    placed = []
    across = min(_ACROSS, len(views))
    for number, view in enumerate(views):
        row, column = divmod(number, across)
        sized = _at(view, 0.0, 0.0, _longest(view, 96.0))
        placed.append(replace(sized, left=column * (sized.width + _GAP), top=row * (sized.height + _GAP)))
    right = max(view.left + view.width for view in placed)
    return Sheet(tuple(placed), right, max(view.top + view.height for view in placed))


def _longest(view: View, usual: float) -> float:
    """Return the longest side of a picture: large enough that a token is 5 points wide, within limits."""
    return min(max(usual, 5.0 * max(view.grid)), 420.0)


def _at(view: View, left: float, top: float, longest: float) -> View:
    high, wide = view.pixels.shape[:2]
    scale = longest / max(high, wide)
    return replace(view, left=left, top=top, width=wide * scale, height=high * scale)
