"""Scenes of the tiny world: sampling, drawing, and which patch shows what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IMAGE_PIXELS = 84
CELL_PIXELS = 28
PATCH_PIXELS = 7
PATCHES_PER_SIDE = IMAGE_PIXELS // PATCH_PIXELS  # 12, so 144 visual tokens

PLACES = ("northwest", "north", "northeast", "west", "center", "east", "southwest", "south", "southeast")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = ("small", "large")
PALETTE = {
    "red": (215, 45, 45),
    "green": (45, 165, 60),
    "blue": (55, 85, 230),
    "yellow": (235, 220, 60),
    "purple": (150, 60, 195),
    "orange": (245, 140, 35),
    "cyan": (60, 210, 220),
    "white": (240, 240, 240),
}
COLORS = tuple(PALETTE)

# Disjoint ranges of scene seeds. `test` is read only by final measurements, never while a recipe is being chosen.
SPLITS = {
    "pretrain": range(10_000_000),
    "validation": range(10_000_000, 11_000_000),
    "recalibration": range(20_000_000, 21_000_000),
    "test": range(30_000_000, 31_000_000),
}
_WORLD = 84_07  # mixed into every scene's seed, so that scene 0 is not numpy's well-worn seed 0
_NUMBER_CHANCE = 0.85
RADIUS = {"small": (5.0, 6.2), "large": (10.0, 12.0)}
_JITTER = 1.2

_FONT = {
    0: "01110 10001 10011 10101 11001 10001 01110",
    1: "00100 01100 00100 00100 00100 00100 01110",
    2: "01110 10001 00001 00010 00100 01000 11111",
    3: "11111 00010 00100 00010 00001 10001 01110",
    4: "00010 00110 01010 10010 11111 00010 00010",
    5: "11111 10000 11110 00001 00001 10001 01110",
    6: "00110 01000 10000 11110 10001 10001 01110",
    7: "11111 00001 00010 00100 01000 01000 01000",
    8: "01110 10001 10001 01110 10001 10001 01110",
    9: "01110 10001 10001 01111 00001 00010 01100",
}


def _glyph(rows: str) -> np.ndarray:
    """Return a digit of the font, each of its pixels drawn 2 x 2, as a boolean (14, 10) mask."""
    pixels = np.array([list(map(int, row)) for row in rows.split()])
    return np.kron(pixels, np.ones((2, 2))).astype(bool)


GLYPHS = {digit: _glyph(rows) for digit, rows in _FONT.items()}


@dataclass(frozen=True)
class Shape:
    """One coloured shape. ``cell`` is 0..8 in raster order; ``center`` and ``radius`` are pixels."""

    cell: int
    color: str
    shape: str
    size: str
    center: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class Number:
    """A two-digit number; ``corner`` is the top-left pixel (row, column) of its 14 x 28 px box."""

    cell: int
    color: str
    digits: tuple[int, int]
    corner: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """Everything about one image that a question can ask for."""

    seed: int
    shapes: tuple[Shape, ...]
    number: Number | None


def split_seeds(split: str, count: int, start: int = 0) -> range:
    """Return ``count`` scene seeds of a split.

    Raises:
        ValueError: if the split is unknown or has fewer scenes than asked for.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown scene split {split!r}; there are {', '.join(SPLITS)}")
    seeds = SPLITS[split][start : start + count]
    if len(seeds) < count:
        held = len(SPLITS[split])
        raise ValueError(f"split {split!r} has {held} scenes; {count} from {start} were asked for")
    return seeds


def sample_scene(seed: int) -> Scene:
    """Draw the scene that belongs to ``seed``; the same seed gives the same scene on every machine."""
    rng = np.random.default_rng([_WORLD, seed])
    cells = rng.permutation(9)  # one thing per cell, so that no shape hides another
    count = int(rng.integers(3, 6))
    pairs = rng.permutation(len(COLORS) * len(SHAPES))[:count]  # no two shapes share both colour and form
    shapes = []
    for cell, pair in zip(cells[:count].tolist(), pairs.tolist(), strict=True):
        size = SIZES[int(rng.integers(2))]
        low, high = RADIUS[size]
        jitter = rng.uniform(-_JITTER, _JITTER, 2)
        row, column = divmod(cell, 3)
        # Off the centre by a little, so that no patch always shows the same part of a shape.
        middle_row = row * CELL_PIXELS + 13.5 + jitter[0]
        middle_column = column * CELL_PIXELS + 13.5 + jitter[1]
        color, form = divmod(pair, len(SHAPES))
        radius = float(rng.uniform(low, high))
        shapes.append(Shape(cell, COLORS[color], SHAPES[form], size, (middle_row, middle_column), radius))
    number = None
    if rng.random() < _NUMBER_CHANCE:
        number = _sample_number(int(cells[count]), rng)
    return Scene(seed, tuple(shapes), number)


def _sample_number(cell: int, rng: np.random.Generator) -> Number:
    row, column = divmod(cell, 3)
    down, right = rng.integers(-1, 2, 2).tolist()
    corner = (row * CELL_PIXELS + 7 + down, column * CELL_PIXELS + right)
    digits = (int(rng.integers(10)), int(rng.integers(10)))
    return Number(cell, COLORS[int(rng.integers(len(COLORS)))], digits, corner)


def shape_mask(shape: Shape, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return which of the pixels ``rows x columns`` the shape covers, as a boolean grid."""
    dy = rows[:, None] - shape.center[0]  # (rows, 1)
    dx = columns[None, :] - shape.center[1]  # (1, columns)
    r = shape.radius
    if shape.shape == "circle":
        return dx**2 + dy**2 <= r**2
    if shape.shape == "square":
        return np.maximum(abs(dx), abs(dy)) <= 0.88 * r
    if shape.shape == "triangle":
        return (abs(dx) <= 0.58 * (dy + r)) & (dy <= 0.85 * r)
    if shape.shape == "diamond":
        return abs(dx) + abs(dy) <= 1.1 * r
    if shape.shape == "cross":
        near, far = np.minimum(abs(dx), abs(dy)), np.maximum(abs(dx), abs(dy))
        return (near <= 0.3 * r) & (far <= r)
    distance = dx**2 + dy**2  # ring
    return (distance <= r**2) & (distance >= (0.55 * r) ** 2)


def _digit_boxes(number: Number) -> list[tuple[int, int, int]]:
    """Return ``(digit, top, left)`` of the two 14 x 10 px glyphs."""
    top, left = number.corner
    first, last = number.digits
    return [(first, top, left + 2), (last, top, left + 16)]


def object_masks(scene: Scene) -> list[np.ndarray]:
    """Return one boolean (84, 84) mask per drawn thing: the shapes, then the first and the second digit."""
    masks = []
    for shape in scene.shapes:
        mask = np.zeros((IMAGE_PIXELS, IMAGE_PIXELS), dtype=bool)
        row, column = divmod(shape.cell, 3)
        top, left = row * CELL_PIXELS, column * CELL_PIXELS
        span = np.arange(CELL_PIXELS)
        # Only its own cell is drawn, and no shape reaches beyond it.
        cell = shape_mask(shape, top + span, left + span)
        mask[top : top + CELL_PIXELS, left : left + CELL_PIXELS] = cell
        masks.append(mask)
    if scene.number is not None:
        for digit, top, left in _digit_boxes(scene.number):
            mask = np.zeros((IMAGE_PIXELS, IMAGE_PIXELS), dtype=bool)
            mask[top : top + 14, left : left + 10] = GLYPHS[digit]
            masks.append(mask)
    return masks


def render(scene: Scene) -> np.ndarray:
    """Draw the scene as ``uint8`` pixels (84, 84, 3); deterministic in the scene's seed."""
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
    for mask, color in zip(object_masks(scene), colors, strict=True):
        ink = np.array(PALETTE[color]) + rng.uniform(-10, 10, 3)
        image[mask] = ink
    return np.clip(image, 0, 255).astype(np.uint8)


def patch_cover(scene: Scene) -> np.ndarray:
    """Return for each drawn thing the share of each patch it covers, ``float64`` (things, 144), raster order."""
    masks = np.stack(object_masks(scene)).astype(float)  # (things, 84, 84)
    side = PATCHES_PER_SIDE
    by_patch = masks.reshape(-1, side, PATCH_PIXELS, side, PATCH_PIXELS)
    return by_patch.mean((2, 4)).reshape(len(masks), -1)
