"""What a figure is made of, in points: pictures, boxes, strokes and words; and how each kind of them looks.

Nothing hangs on a colour alone: what is dropped is dark, what is kept is bright with an outline, a merged token has a
dot and a stroke to the one it went into, and a token that the LLM drops between its layers is crossed out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ImageFont

Color = tuple[int, int, int, float]
"""Red, green and blue of 8 bits, and opacity."""

CENTRES = 6
"""Colours of merged groups, which go round: a stroke says which token went where."""


@dataclass(frozen=True)
class Look:
    """How a kind of shape looks.

    Attributes:
        fill: inside; None for nothing.
        stroke: its line; None for none.
        width: of the line, in points.
    """

    fill: Color | None = None
    stroke: Color | None = None
    width: float = 0.0


_GROUPS: Sequence[tuple[int, int, int]] = (
    (255, 214, 10),
    (120, 200, 255),
    (255, 255, 255),
    (255, 160, 200),
    (130, 235, 195),
    (255, 180, 110),
)
"""Light, since they lie on a dark veil; told apart with any colour vision (after Okabe and Ito)."""

LOOKS: dict[str, Look] = {
    "dropped": Look(fill=(10, 12, 16, 0.76)),
    "merged": Look(fill=(10, 12, 16, 0.58)),
    "inside": Look(fill=(10, 12, 16, 0.36)),
    "outside": Look(fill=(128, 132, 138, 1.0)),
    "kept": Look(stroke=(255, 255, 255, 0.92), width=0.9),
    "cross": Look(stroke=(255, 255, 255, 0.95), width=0.9),
    "swatch": Look(fill=(176, 196, 214, 1.0)),
    "ground": Look(fill=(255, 255, 255, 1.0)),
    "rule": Look(stroke=(214, 217, 221, 1.0), width=0.8),
    "name": Look(fill=(10, 12, 16, 0.72)),
}
for _number, _color in enumerate(_GROUPS):
    LOOKS[f"centre-{_number}"] = Look(stroke=(*_color, 1.0), width=2.0)
    LOOKS[f"link-{_number}"] = Look(stroke=(*_color, 0.85), width=0.7)
    LOOKS[f"thin-{_number}"] = Look(stroke=(*_color, 0.5), width=0.5)
    LOOKS[f"dot-{_number}"] = Look(fill=(*_color, 1.0))

INKS: dict[str, tuple[int, int, int]] = {
    "ink": (27, 30, 34),
    "quiet": (86, 92, 100),
    "right": (20, 104, 58),
    "wrong": (156, 42, 28),
    "light": (255, 255, 255),
}


@dataclass(frozen=True)
class Picture:
    """A picture: one of a key is drawn alike everywhere.

    Attributes:
        key: names it; the same key is the same picture in the same size.
        left: in points, as all that follows.
        top: likewise.
        width: likewise.
        height: likewise.
        pixels: (H, W, 3), 8 bits.
        smooth: whether it may be smoothed; a map has cells.
    """

    key: str
    left: float
    top: float
    width: float
    height: float
    pixels: np.ndarray
    smooth: bool = True


@dataclass(frozen=True)
class Box:
    """A rectangle; ``token`` is the number of the token that it stands for, ``into`` the one it went into."""

    kind: str
    left: float
    top: float
    width: float
    height: float
    token: int | None = None
    into: int | None = None


@dataclass(frozen=True)
class Stroke:
    """A line from one point to another."""

    kind: str
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Words:
    """One line of text; ``top`` is where its letters stand (the baseline)."""

    text: str
    left: float
    top: float
    size: float
    ink: str = "ink"
    bold: bool = False


@dataclass(frozen=True)
class Group:
    """Shapes that belong together, such as a cell, with what it is for people and programs."""

    shapes: Sequence[Shape]
    about: str = ""
    data: dict[str, str] = field(default_factory=dict)


Shape = Picture | Box | Stroke | Words | Group


@lru_cache(maxsize=64)
def font(size: float, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return the font that figures are measured and drawn with: matplotlib's own, which is there on every machine."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def wrapped(text: str, width: float, size: float, bold: bool = False) -> list[str]:
    """Return a text in lines that are at most ``width`` points wide; a longer word is cut."""
    measure = font(20.0, bold)
    limit = width * 20.0 / size
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            while word:
                joined = f"{line} {word}".strip()
                if measure.getlength(joined) <= limit:
                    line, word = joined, ""
                elif line:
                    lines.append(line)
                    line = ""
                else:
                    end = max(1, next(n for n in range(len(word), -1, -1) if measure.getlength(word[:n]) <= limit))
                    lines.append(word[:end])
                    word = word[end:]
        if line:
            lines.append(line)
    return lines or [""]
