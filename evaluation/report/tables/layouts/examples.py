"""Questions with what arms kept of the picture and what they answered, as data: what the HTML report shows of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from prunetune.evaluation.report.tables.table import Part

_SIDE = 448
"""Longest side of a picture in pixels: a report with 24 of them stays one that can be mailed."""
_SMALL = 12_000
"""Bytes up to which a picture is kept to the last bit."""


class Picture(Part):
    """A picture as it stands in a page.

    Attributes:
        media: its format.
        data: the file, base64.
        width: in pixels.
        height: in pixels.
    """

    media: Literal["image/png", "image/jpeg"]
    data: str = Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$")
    width: int = Field(gt=0)
    height: int = Field(gt=0)

    @classmethod
    def of(cls, pixels: np.ndarray) -> Picture:
        """Return pixels (H, W, 3) of 8 bits as a picture: PNG where that is small, JPEG of a photograph."""
        image = Image.fromarray(pixels).convert("RGB")
        image.thumbnail((_SIDE, _SIDE))
        media: Literal["image/png", "image/jpeg"] = "image/png"
        file = _file(image, "PNG", optimize=True)
        if len(file) > _SMALL:
            media, file = "image/jpeg", _file(image, "JPEG", quality=82, optimize=True)
        return cls(media=media, data=base64.b64encode(file).decode(), width=image.width, height=image.height)


def _file(image: Image.Image, kind: str, **options: int | bool) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


class Answered(Part):
    """What an arm kept of a picture and answered.

    Attributes:
        prediction: the arm's answer.
        score: from 0 to 1.
        kept: the kept positions in raster order, ascending.
        grid: rows and columns of the patches.
    """

    prediction: str
    score: float = Field(ge=0, le=1)
    kept: list[int]
    grid: tuple[int, int]

    @model_validator(mode="after")
    def _within(self) -> Answered:
        rows, columns = self.grid
        if any(not 0 <= position < rows * columns for position in self.kept):
            raise ValueError(f"kept positions are from 0 to {rows * columns - 1}, got {self.kept}")
        return self


class Example(Part):
    """A question about a picture.

    Attributes:
        task: the benchmark.
        id: within it.
        question: as it was asked.
        answer: the right one, or several.
        picture: as the vision tower saw it.
        arms: by the id of a table's row.
    """

    task: str
    id: str
    question: str
    answer: str
    picture: Picture
    arms: dict[str, Answered]


class Examples(Part):
    """Some questions of a table.

    Attributes:
        how: how they were chosen, one sentence.
        examples: in that order.
    """

    how: str
    examples: list[Example]

    @classmethod
    def joined(cls, parts: Sequence[Examples]) -> Examples:
        """Return the examples of several models or benchmarks together."""
        how = " ".join(dict.fromkeys(part.how for part in parts))
        return cls(how=how, examples=[example for part in parts for example in part.examples])
