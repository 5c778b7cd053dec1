"""What opens the tiny worlds' images; it needs neither torch nor datasets, as reading answers needs neither."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from prunetune.data_recipes.sample import DataError
from prunetune.tiny_world import render, sample_scene


def _draw(seed: int) -> np.ndarray:
    return render(sample_scene(seed))


@dataclass(frozen=True)
class SceneImages:
    """Images of a tiny world; a reference is ``scene:SEED``.

    Attributes:
        kind: what stands before the seed.
        draw: returns the pixels of a seed's scene, ``uint8`` (H, W, 3).
    """

    kind: str = "scene"
    draw: Callable[[int], np.ndarray] = _draw

    def exists(self, reference: str) -> bool:
        """Return whether the reference names a scene."""
        kind, _, seed = reference.partition(":")
        return kind == self.kind and seed.isdigit()

    def open(self, reference: str, sample_id: str) -> Image.Image:
        """Draw the scene."""
        if not self.exists(reference):
            raise DataError(f"sample {sample_id!r}: {reference!r} is no scene of the tiny world ({self.kind}:SEED)")
        return Image.fromarray(self.draw(int(reference.partition(":")[2])))
