"""Pictures padded to squares, bit for bit as the model's processor makes them, in a tenth of its time.

Pillow filters rows first and rounds to 8 bits between its two passes. A picture wider than high therefore needs no
padded copy of its full size: it is resized along its rows, laid on a narrow canvas, and resized along its columns.
Rescaling and normalising are one look-up in a table of 3 x 256 numbers, which the processor itself has computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prunetune.data_recipes.images import pad_to_square

PIXELS = "pixel_values"


class FastPictures:
    """Makes pixels of pictures.

    Attributes:
        side: of the square that the model sees, in pixels.
        table: what the processor makes of each grey level, float32 (3, 256).
    """

    def __init__(self, side: int, resample: int, color: tuple[int, int, int], table: np.ndarray) -> None:
        self.side, self.table = side, table
        self._resample, self._color = Image.Resampling(resample), color

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Return an RGB picture as it is before rescaling and normalising: uint8 (3, side, side)."""
        width, height = image.size
        side = self.side
        if width > height:
            rows = image.resize((side, height), self._resample)
            canvas = Image.new("RGB", (side, width), self._color)
            canvas.paste(rows, (0, (width - height) // 2))
            square = canvas.resize((side, side), self._resample)
        else:
            square = pad_to_square(image, self._color).resize((side, side), self._resample)
        return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))

    def floats(self, pixels: np.ndarray) -> np.ndarray:
        """Return the processor's numbers for uint8 (..., 3, H, W): float32 of that shape."""
        found = np.empty(pixels.shape, dtype=np.float32)
        for channel in range(3):
            np.take(self.table[channel], pixels[..., channel, :, :], out=found[..., channel, :, :], mode="clip")
        return found


class Pictures:
    """Turns the pictures of a batch into the processor's inputs.

    Attributes:
        fast: the fast way, where it is exact; None otherwise.
        plain: whether all that the processor writes into a text for a picture is places, so that text and pictures
            can be made apart. It is tried only where that would save something.
    """

    def __init__(self, processor: Any, square: str, by_segments: bool) -> None:
        self._processor, self._square = processor, square
        self.fast = fast_pictures(processor) if square == "pad" else None
        self._places = 0
        self.plain = (self.fast is not None or by_segments) and self._writes_places_alone()

    def inputs(self, images: Sequence[Image.Image], raw: bool = False) -> tuple[dict[str, Tensor], list[int]]:
        """Return the model's inputs for pictures as they were opened, and how many tokens each of them has.

        Args:
            images: RGB.
            raw: leave the pixels uint8 where the fast way is used.
        """
        if not images:
            return {}, []
        if self.fast is not None:
            pixels = np.stack([self.fast.pixels(image) for image in images])  # (B, 3, side, side)
            values = torch.from_numpy(pixels if raw else self.fast.floats(pixels))
            return {PIXELS: values}, [self._places] * len(images)
        return self._by_processor(images)

    def _by_processor(self, images: Sequence[Image.Image]) -> tuple[dict[str, Tensor], list[int]]:
        if self._square == "pad":
            color = mean_color(self._processor)
            images = [pad_to_square(image, color) for image in images]
        made = self._processor(images=[[image] for image in images], return_tensors="pt")
        places = []
        for number in range(len(images)):
            written = self._processor.replace_image_token(made, image_idx=number)
            places.append(written.count(self._processor.image_token))
        return dict(made), places

    def _writes_places_alone(self) -> bool:
        processor = self._processor
        images = []
        for number, (width, height) in enumerate(((61, 43), (43, 61))):
            noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            images.append(Image.fromarray(noise))
        try:
            token, number = processor.image_token, processor.image_token_id
            whole = processor(text=[token, token], images=[[image] for image in images], add_special_tokens=False)
            made, places = self._by_processor(images)
            written = [processor.replace_image_token(made, image_idx=image) for image in (0, 1)]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, NotImplementedError):
            return False  # of another kind: the processor makes text and pictures together
        if set(whole) != {"input_ids", "attention_mask", *made}:
            return False
        self._places = places[0]
        if self.fast is not None and places[0] != places[1]:
            return False
        for row in (0, 1):
            if written[row] != token * places[row] or list(whole["input_ids"][row]) != [number] * places[row]:
                return False
        return True


def look_up(table: Tensor, pixels: Tensor) -> Tensor:
    """Return the processor's numbers for uint8 pixels (B, 3, H, W), on their device and bit for bit: float32.

    Args:
        table: float32 (3, 256), on the same device.
        pixels: values of the three colours.
    """
    found = []
    for channel in range(3):
        values = pixels[:, channel]
        found.append(table[channel].index_select(0, values.flatten().int()).view(values.shape))
    return torch.stack(found, dim=1)


def fast_pictures(processor: Any) -> FastPictures | None:
    """Return what makes this processor's pixels of pictures padded to squares; None if it would make others.

    It is tried on pictures of odd sizes, wide, high and square, smaller and larger than what the model sees; one bit of
    difference, and the processor stays in use.
    """
    images: Any = getattr(processor, "image_processor", None)
    side = _side(images)
    if side is None:
        return None
    color = mean_color(processor)
    try:
        fast = FastPictures(side, int(images.resample), color, _table(images))
        odd = ((2 * side + 3, side + 5), (side - 3, 2 * side + 1), (37, 23), (31, 31))
        for number, (width, height) in enumerate(odd):
            noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            image = Image.fromarray(noise)
            expected = processor(images=[pad_to_square(image, color)], return_tensors="np")
            if set(expected) != {PIXELS} or not np.array_equal(
                np.asarray(expected[PIXELS]), fast.floats(fast.pixels(image))[None]
            ):
                return None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):  # it does not take what CLIP's does
        return None
    return fast


def mean_color(processor: Any) -> tuple[int, int, int]:
    """Return the colour that squares are filled with, as LLaVA-1.5 does."""
    red, green, blue = processor.image_processor.image_mean
    return int(255 * red), int(255 * green), int(255 * blue)


def _side(images: Any) -> int | None:
    """Return the side of the squares that an image processor makes of squares; None if it is not of CLIP's kind."""
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not getattr(images, step, False):
            return None
    size = dict(getattr(images, "size", None) or {})
    if set(size) == {"shortest_edge"}:
        side = size["shortest_edge"]
    elif set(size) == {"height", "width"} and size["height"] == size["width"]:
        side = size["height"]
    else:
        return None
    crop = dict(getattr(images, "crop_size", None) or {})
    if getattr(images, "do_center_crop", False) and (crop.get("height"), crop.get("width")) != (side, side):
        return None
    return int(side)


def _table(images: Any) -> np.ndarray:
    grey = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    made = images([Image.fromarray(grey)], do_resize=False, do_center_crop=False, return_tensors="np")
    return np.asarray(made[PIXELS], dtype=np.float32).reshape(3, 256)
