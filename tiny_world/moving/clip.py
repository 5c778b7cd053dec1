"""Clips: sampling and drawing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prunetune.tiny_world.scene import (
    CELL_PIXELS,
    COLORS,
    IMAGE_PIXELS,
    PALETTE,
    PATCH_PIXELS,
    PATCHES_PER_SIDE,
    RADIUS,
    SHAPES,
    SIZES,
    Shape,
    shape_mask,
)

FRAMES = 4
WAYS = ("north", "south", "west", "east")
_WORLD = 84_08  # another one than the scenes', so that clip 5 is not scene 5
_EVENING = (104, 92, 80, 68)
"""Grey of the background, frame by frame: it is getting dark, so that a frame looks like its time."""


@dataclass(frozen=True)
class Clip:
    """Everything about one clip that a question can ask for.

    Attributes:
        seed: which clip it is.
        mover: the shape that crosses the board, as it is in the first frame.
        way: where it goes, one of ``WAYS``.
        cells: the cell, 0 to 8 in raster order, that the mover starts in, and the one that it ends in.
        still: the shapes that stay where they are.
        newcomer: which of them is not there at first.
        since: the frame that the newcomer is there from.
    """

    seed: int
    mover: Shape
    way: str
    cells: tuple[int, int]
    still: tuple[Shape, ...]
    newcomer: int
    since: int


def sample_clip(seed: int) -> Clip:
    """Draw the clip that belongs to ``seed``; the same seed gives the same clip on every machine."""
    rng = np.random.default_rng([_WORLD, seed])
    way = WAYS[int(rng.integers(len(WAYS)))]
    lane = int(rng.integers(3))
    upright = way in ("north", "south")
    on_lane = [3 * step + lane if upright else 3 * lane + step for step in range(3)]
    if way in ("north", "west"):
        on_lane.reverse()
    free = rng.permutation([cell for cell in range(9) if cell not in on_lane]).tolist()
    count = int(rng.integers(2, 4))
    forms = rng.permutation(len(SHAPES))[: count + 1].tolist()  # no two share a form, and none a colour
    colors = rng.permutation(len(COLORS))[: count + 1].tolist()
    shapes = []
    for cell, form, color in zip([on_lane[0], *free[:count]], forms, colors, strict=True):
        shapes.append(_shape(cell, SHAPES[form], COLORS[color], rng))
    mover, *still = shapes
    newcomer, since = int(rng.integers(count)), int(rng.integers(1, FRAMES))
    return Clip(seed, mover, way, (on_lane[0], on_lane[-1]), tuple(still), newcomer, since)


def _shape(cell: int, form: str, color: str, rng: np.random.Generator) -> Shape:
    row, column = divmod(cell, 3)
    size = SIZES[int(rng.integers(2))]
    radius = float(rng.uniform(*RADIUS[size]))
    middle = (row * CELL_PIXELS + 13.5, column * CELL_PIXELS + 13.5)
    return Shape(cell, color, form, size, middle, radius)


def shapes_at(clip: Clip, frame: int) -> list[Shape]:
    """Return what a frame shows, the mover last."""
    shown = []
    for number, shape in enumerate(clip.still):
        if number != clip.newcomer or frame >= clip.since:
            shown.append(shape)
    down, right = {"north": (-1, 0), "south": (1, 0), "west": (0, -1), "east": (0, 1)}[clip.way]
    gone = 2 * CELL_PIXELS * frame / (FRAMES - 1)  # from the middle of the first cell to that of the last
    center = (clip.mover.center[0] + down * gone, clip.mover.center[1] + right * gone)
    shown.append(Shape(clip.mover.cell, clip.mover.color, clip.mover.shape, clip.mover.size, center, clip.mover.radius))
    return shown


def render_clip(clip: Clip) -> np.ndarray:
    """Draw the clip as ``uint8`` pixels (4, 84, 84, 3); deterministic in the clip's seed."""
    rng = np.random.default_rng([_WORLD, clip.seed, 1])
    # As in scenes: the background differs from patch to patch, and here stays the same from frame to frame.
    coarse = rng.normal(0, 5, (PATCHES_PER_SIDE, PATCHES_PER_SIDE, 1)).repeat(PATCH_PIXELS, 0).repeat(PATCH_PIXELS, 1)
    inks = {shape.color: rng.uniform(-10, 10, 3) for shape in (clip.mover, *clip.still)}
    span = np.arange(IMAGE_PIXELS)
    frames = []
    for frame, grey in enumerate(_EVENING):
        image = grey + coarse + rng.normal(0, 3, (IMAGE_PIXELS, IMAGE_PIXELS, 1)) + np.zeros(3)
        for shape in shapes_at(clip, frame):
            image[shape_mask(shape, span, span)] = np.array(PALETTE[shape.color]) + inks[shape.color]
        frames.append(np.clip(image, 0, 255).astype(np.uint8))
    return np.stack(frames)
