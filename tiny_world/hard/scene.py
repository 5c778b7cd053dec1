"""Scenes of the harder tiny world: sampling, drawing, and which patch shows what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prunetune.tiny_world.scene import COLORS, GLYPHS, PALETTE, SHAPES, SIZES, Number, Scene, Shape, shape_mask

IMAGE_PIXELS = 96
CELL_PIXELS = 24
PATCH_PIXELS = 8
CELLS_PER_SIDE = IMAGE_PIXELS // CELL_PIXELS
PATCHES_PER_SIDE = IMAGE_PIXELS // PATCH_PIXELS  # 12, so 144 visual tokens
PATCHES = PATCHES_PER_SIDE**2

# A place is two words, so that no single word of an answer names it.
ROWS = ("top", "upper", "lower", "bottom")
COLUMNS = ("west", "midwest", "mideast", "east")

_WORLD = 96_08  # another one than the tiny world's, so that scene 5 of the one is not scene 5 of the other
_NUMBER_CHANCE = 0.85
_RADIUS = {"small": (5.0, 6.2), "large": (9.5, 11.0)}
_JITTER = 1.2
_DIGIT_LEFT = (0, 14)
"""Where in its cell each digit starts: either has a column of patches that shows nothing of the other."""


@dataclass(frozen=True)
class Patches:
    """Which patches show what; things are the shapes in order, then the first and the second digit.

    Attributes:
        owned: boolean (things, 144). A patch belongs to the thing that covers most of it, if that is 8 % or more; the
            middle patch of a shape's cell is always the shape's, even in the hole of a large ring.
        anchors: the middle patch of each shape, ``int`` (shapes,).
    """

    owned: np.ndarray
    anchors: np.ndarray


def place(cell: int) -> str:
    """Return the two words for a cell, 0 to 15 in raster order."""
    row, column = divmod(cell, CELLS_PER_SIDE)
    return f"{ROWS[row]} {COLUMNS[column]}"


def sample_hard_scene(seed: int) -> Scene:
    """Draw the scene that belongs to ``seed``; the same seed gives the same scene on every machine.

    A scene takes only 3 to 5 of the colours and 3 or 4 of the forms for its 6 to 9 objects, so one attribute alone
    seldom names one of them. No two objects share size, colour and form; two of the three they often share.
    """
    rng = np.random.default_rng([_WORLD, seed])
    cells = rng.permutation(CELLS_PER_SIDE**2)  # one thing per cell, so that no shape hides another
    count = int(rng.integers(6, 10))
    colors = rng.permutation(len(COLORS)).tolist()
    used = int(rng.integers(3, 6))
    forms = rng.permutation(len(SHAPES))[: int(rng.integers(3, 5))].tolist()
    looks = [(size, color, form) for size in SIZES for color in colors[:used] for form in forms]
    shapes = []
    for cell, look in zip(cells.tolist(), rng.permutation(len(looks))[:count].tolist(), strict=False):
        size, color, form = looks[look]
        jitter = rng.uniform(-_JITTER, _JITTER, 2)
        row, column = divmod(cell, CELLS_PER_SIDE)
        middle_row = (row + 0.5) * CELL_PIXELS - 0.5 + jitter[0]
        middle_column = (column + 0.5) * CELL_PIXELS - 0.5 + jitter[1]
        radius = float(rng.uniform(*_RADIUS[size]))
        shapes.append(Shape(cell, COLORS[color], SHAPES[form], size, (middle_row, middle_column), radius))
    number = None
    if rng.random() < _NUMBER_CHANCE:
        # Its colour is none of the objects': "the red object" and "how many are red" cannot mean the number.
        ink = COLORS[colors[int(rng.integers(used, len(COLORS)))]]
        number = _sample_number(int(cells[count]), ink, rng)
    return Scene(seed, tuple(shapes), number)


def _sample_number(cell: int, ink: str, rng: np.random.Generator) -> Number:
    row, column = divmod(cell, CELLS_PER_SIDE)
    corner = (row * CELL_PIXELS + 5 + int(rng.integers(-2, 3)), column * CELL_PIXELS)
    return Number(cell, ink, (int(rng.integers(10)), int(rng.integers(10))), corner)


def object_masks(scene: Scene) -> np.ndarray:
    """Return one boolean (96, 96) mask per drawn thing: the shapes, then the first and the second digit."""
    digits = 2 if scene.number is not None else 0
    masks = np.zeros((len(scene.shapes) + digits, IMAGE_PIXELS, IMAGE_PIXELS), dtype=bool)
    span = np.arange(CELL_PIXELS)
    for mask, shape in zip(masks, scene.shapes, strict=False):
        row, column = divmod(shape.cell, CELLS_PER_SIDE)
        top, left = row * CELL_PIXELS, column * CELL_PIXELS
        # Only its own cell is drawn, and no shape reaches beyond it.
        mask[top : top + CELL_PIXELS, left : left + CELL_PIXELS] = shape_mask(shape, top + span, left + span)
    if scene.number is not None:
        top, left = scene.number.corner
        for mask, digit, offset in zip(masks[-2:], scene.number.digits, _DIGIT_LEFT, strict=True):
            glyph = GLYPHS[digit]
            mask[top : top + glyph.shape[0], left + offset : left + offset + glyph.shape[1]] = glyph
    return masks


def render_hard(scene: Scene, masks: np.ndarray | None = None) -> np.ndarray:
    """Draw the scene as ``uint8`` pixels (96, 96, 3); deterministic in the scene's seed.

    ``masks`` are those of :func:`object_masks`, where they are known already.
    """
    if masks is None:
        masks = object_masks(scene)
    # A generator of its own: a change of the drawing leaves the scenes, and so the answers, as they are.
    rng = np.random.default_rng([_WORLD, scene.seed, 1])
    # The background differs from patch to patch: the patches of an even one would be duplicates of one another.
    coarse = rng.normal(0, 5, (PATCHES_PER_SIDE, PATCHES_PER_SIDE, 1))
    coarse = coarse.repeat(PATCH_PIXELS, 0).repeat(PATCH_PIXELS, 1)
    grey = rng.uniform(70, 105) + coarse
    fine = rng.normal(0, 3, (IMAGE_PIXELS, IMAGE_PIXELS, 1))
    image = grey + fine + np.zeros(3)
    colors = [shape.color for shape in scene.shapes]
    if scene.number is not None:
        colors += [scene.number.color] * 2
    for mask, color in zip(masks, colors, strict=True):
        ink = np.array(PALETTE[color]) + rng.uniform(-10, 10, 3)
        image[mask] = ink
    return np.clip(image, 0, 255).astype(np.uint8)


def patches_of(scene: Scene, masks: np.ndarray | None = None, visible: float = 0.08) -> Patches:
    """Return which patches show which thing, a patch from the share ``visible`` of its pixels on."""
    if masks is None:
        masks = object_masks(scene)
    side = PATCHES_PER_SIDE
    by_patch = masks.reshape(-1, side, PATCH_PIXELS, side, PATCH_PIXELS)
    cover = by_patch.mean((2, 4), dtype=np.float32).reshape(len(masks), -1)  # (things, 144)
    anchors = np.array([_middle_patch(shape.cell) for shape in scene.shapes])
    cover[np.arange(len(anchors)), anchors] = 1
    owner = cover.argmax(0)
    seen = cover.max(0) > visible
    owned = seen & (owner == np.arange(len(masks))[:, None])
    return Patches(owned, anchors)


def _middle_patch(cell: int) -> int:
    row, column = divmod(cell, CELLS_PER_SIDE)
    per_cell = CELL_PIXELS // PATCH_PIXELS
    return (row * per_cell + 1) * PATCHES_PER_SIDE + column * per_cell + 1
