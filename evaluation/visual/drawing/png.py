"""Shapes as pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from prunetune.evaluation.visual.drawing.shapes import (
    INKS,
    LOOKS,
    Box,
    Color,
    Group,
    Picture,
    Shape,
    Stroke,
    Words,
    font,
)

_SCALE = 2.0
_LARGEST = 60_000_000
"""Pixels of a figure, beyond which a point is one of them."""


def paint(shapes: Sequence[Shape], width: float, height: float) -> Image.Image:
    """Return shapes on white, two pixels a point; one where the figure would be larger than most programs open."""
    scale = _SCALE if width * height * _SCALE**2 <= _LARGEST else 1.0
    image = Image.new("RGB", (round(width * scale), round(height * scale)), "white")
    _Painter(image, scale).draw(shapes)
    return image


class _Painter:
    def __init__(self, image: Image.Image, scale: float) -> None:
        self.image = image
        self.scale = scale
        self.pen = ImageDraw.Draw(image, "RGBA")  # colours with opacity are laid over what is there
        self._resized: dict[str, Image.Image] = {}

    def draw(self, shapes: Sequence[Shape]) -> None:
        for shape in shapes:
            if isinstance(shape, Group):
                self.draw(shape.shapes)
            elif isinstance(shape, Picture):
                self._picture(shape)
            elif isinstance(shape, Box):
                self._box(shape)
            elif isinstance(shape, Stroke):
                look = LOOKS[shape.kind]
                assert look.stroke is not None
                ends = [value * self.scale for value in (shape.x1, shape.y1, shape.x2, shape.y2)]
                self.pen.line(ends, fill=_ink(look.stroke), width=max(1, round(look.width * self.scale)))
            else:
                self._words(shape)

    def _picture(self, shape: Picture) -> None:
        left, top, right, bottom = self._edges(shape.left, shape.top, shape.width, shape.height)
        size = (right - left, bottom - top)
        key = f"{shape.key} {size}"
        if key not in self._resized:
            how = Image.Resampling.LANCZOS if shape.smooth else Image.Resampling.NEAREST
            self._resized[key] = Image.fromarray(np.ascontiguousarray(shape.pixels)).resize(size, how)
        self.image.paste(self._resized[key], (left, top))

    def _box(self, shape: Box) -> None:
        look = LOOKS[shape.kind]
        left, top, right, bottom = self._edges(shape.left, shape.top, shape.width, shape.height)
        corners = (left, top, max(left, right - 1), max(top, bottom - 1))  # Pillow draws both ends
        fill = None if look.fill is None else _ink(look.fill)
        outline = None if look.stroke is None else _ink(look.stroke)
        self.pen.rectangle(corners, fill=fill, outline=outline, width=max(1, round(look.width * self.scale)))

    def _words(self, shape: Words) -> None:
        own = font(shape.size * self.scale, shape.bold)
        at = (shape.left * self.scale, shape.top * self.scale)
        self.pen.text(at, shape.text, font=own, fill=INKS[shape.ink], anchor="ls")

    def _edges(self, left: float, top: float, width: float, height: float) -> tuple[int, int, int, int]:
        """Return edges in whole pixels; neighbours share theirs, so that no line shows between two veils."""
        scale = self.scale
        return round(left * scale), round(top * scale), round((left + width) * scale), round((top + height) * scale)


def _ink(color: Color) -> tuple[int, int, int, int]:
    return (*color[:3], round(255 * color[3]))
