"""What opens the harder world's images: references are ``hard_scene:SEED``."""

from __future__ import annotations

import numpy as np

from prunetune.tiny_world.hard import render_hard, sample_hard_scene
from prunetune.tiny_world.images import SceneImages

KIND = "hard_scene"


def _draw(seed: int) -> np.ndarray:
    return render_hard(sample_hard_scene(seed))


def hard_images() -> SceneImages:
    """Return what draws the harder world's scenes."""
    return SceneImages(KIND, _draw)
