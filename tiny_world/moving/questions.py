"""Six questions per clip; five of them can't be answered from one frame."""

from __future__ import annotations

import numpy as np

from prunetune.tiny_world.moving.clip import Clip
from prunetune.tiny_world.questions import Question
from prunetune.tiny_world.scene import PLACES

WORDS = ("way", "goes", "which", "moves", "appears", "does", "start", "end")
"""Words of these questions that the scenes' questions do not have."""


def ask_clip(clip: Clip) -> list[Question]:
    """Pose the clip's six questions; the same clip gets the same questions on every machine."""
    rng = np.random.default_rng([clip.seed, 6])
    mover, new = clip.mover, clip.still[clip.newcomer]
    start, end = clip.cells
    one = [mover, *clip.still][int(rng.integers(1 + len(clip.still)))]
    return [
        _asked("way", f"which way goes the {mover.shape} ?", clip.way),
        _asked("moves", "what moves ?", f"{mover.color} {mover.shape}"),
        _asked("start", f"where does the {mover.shape} start ?", PLACES[start]),
        _asked("end", f"where does the {mover.shape} end ?", PLACES[end]),
        _asked("appears", "what appears ?", f"{new.color} {new.shape}"),
        _asked("color", f"what color is the {one.shape} ?", one.color),
    ]


def _asked(kind: str, text: str, answer: str) -> Question:
    return Question("clip", kind, text, answer)
