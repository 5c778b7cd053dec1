"""A sheet of pictures with what became of its tokens, or with a map of them, as shapes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from prunetune.evaluation.visual.drawing.shapes import CENTRES, Box, Picture, Shape, Stroke, Words
from prunetune.evaluation.visual.maps import TokenMap
from prunetune.evaluation.visual.states import INSIDE, KEPT, MERGED, WORDS, States
from prunetune.evaluation.visual.views import Sheet

_MANY = 48
"""Merged tokens, above which their strokes are thin: they run over what is kept."""


def pictures(sheet: Sheet, left: float, top: float, names: bool = False) -> list[Shape]:
    """Return the pictures of a sheet that begins at a point, with their names if asked."""
    found: list[Shape] = []
    for number, view in enumerate(sheet.views):
        found.append(Picture(f"view-{number}", left + view.left, top + view.top, view.width, view.height, view.pixels))
    for view in sheet.views if names and len(sheet.views) > 1 else ():
        where, under = left + view.left, top + view.top
        found.append(Box("name", where, under, 6.0 + 4.6 * len(view.name), 11.0))
        found.append(Words(view.name, where + 3.0, under + 8.2, 7.5, "light"))
    return found


def tokens(sheet: Sheet, states: States, left: float, top: float) -> list[Shape]:
    """Return a box for every token, and a stroke from every merged one to the token that it went into."""
    veils: list[Shape] = []
    kept: list[Shape] = []
    for view in sheet.views:
        for number, at_left, at_top, wide, high in view.boxes():
            x, y = left + at_left, top + at_top
            if int(states.state[number]) == KEPT:
                kept += _kept(x, y, wide, high, number, bool(states.foreign[number]))
            else:
                veils += _veil(x, y, wide, high, number, states)
    return [*veils, *kept, *_merges(sheet, states, left, top)]


def _kept(x: float, y: float, wide: float, high: float, number: int, foreign: bool) -> list[Shape]:
    inset = min(0.5, wide / 8)
    box = Box("kept", x + inset, y + inset, wide - 2 * inset, high - 2 * inset, number)
    if not foreign:
        return [box]
    across = Stroke("cross", x + wide * 0.2, y + high * 0.5, x + wide * 0.8, y + high * 0.5)
    return [box, across, Stroke("cross", x + wide * 0.5, y + high * 0.2, x + wide * 0.5, y + high * 0.8)]


def _veil(x: float, y: float, wide: float, high: float, number: int, states: States) -> list[Shape]:
    state = int(states.state[number])
    into = int(states.into[number]) if state == MERGED else None
    box = Box(WORDS[state], x, y, wide, high, number, into)
    if state != INSIDE:
        return [box]
    return [box, Stroke("cross", x + wide * 0.2, y + high * 0.8, x + wide * 0.8, y + high * 0.2)]


def _merges(sheet: Sheet, states: States, left: float, top: float) -> list[Shape]:
    """Return strokes from merged tokens to those that they went into, and the outlines of these."""
    centres = np.flatnonzero(states.centres())
    colour_of = {int(token): place % CENTRES for place, token in enumerate(centres)}
    link = "link" if (states.into >= 0).sum() <= _MANY else "thin"
    at: dict[int, tuple[float, float, float, float]] = {}
    for view in sheet.views:
        for number, at_left, at_top, wide, high in view.boxes():
            at[number] = (left + at_left, top + at_top, wide, high)
    strokes: list[Shape] = []
    dots: list[Shape] = []
    for number in np.flatnonzero(states.into >= 0).tolist():
        into = int(states.into[number])
        colour = colour_of[into]
        (x1, y1), (x2, y2) = _middle(*at[number]), _middle(*at[into])
        strokes.append(Stroke(f"{link}-{colour}", x1, y1, x2, y2))
        dots.append(Box(f"dot-{colour}", x1 - 1.1, y1 - 1.1, 2.2, 2.2))
    for token, colour in colour_of.items():
        x, y, wide, high = at[token]
        dots.append(Box(f"centre-{colour}", x + 1, y + 1, wide - 2, high - 2))
    return [*strokes, *dots]


def _middle(x: float, y: float, wide: float, high: float) -> tuple[float, float]:
    return x + wide / 2, y + high / 2


def heat(sheet: Sheet, shown: TokenMap, left: float, top: float, key: str) -> list[Shape]:
    """Return a map as pictures with a cell a token, dark for little and light for much."""
    low, high = limits(shown)
    table = _table()
    found: list[Shape] = []
    for number, view in enumerate(sheet.views):
        values = shown.values[view.numbers]
        share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
        cells = table[np.round(share * (len(table) - 1)).astype(int)].reshape(*view.grid, 3)
        where = (left + view.left, top + view.top, view.width, view.height)
        found.append(Picture(f"{key}-{number}", *where, cells, smooth=False))
    return found


def limits(shown: TokenMap) -> tuple[float, float]:
    """Return what is drawn darkest and lightest; a hundredth of the tokens may lie above, or one would darken all."""
    return float(shown.values.min()), float(np.quantile(shown.values, 0.99))


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    """Return cividis (256, 3): its lightness rises evenly, in grey and with any colour vision."""
    import matplotlib

    colours = np.asarray(matplotlib.colormaps["cividis"](np.arange(256)))
    return np.round(colours[:, :3] * 255).astype(np.uint8)
