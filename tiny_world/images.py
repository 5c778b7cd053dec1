"""What opens the tiny world's images; it needs neither torch nor datasets, as reading answers needs neither."""

from __future__ import annotations

from PIL import Image

from prunetune.data_recipes.sample import DataError
from prunetune.tiny_world import render, sample_scene


class SceneImages:
    """Images of the tiny world; a reference is ``scene:SEED``."""

    def exists(self, reference: str) -> bool:
        """Return whether the reference names a scene."""
        kind, _, seed = reference.partition(":")
        return kind == "scene" and seed.isdigit()

    def open(self, reference: str, sample_id: str) -> Image.Image:
        """Draw the scene."""
        if not self.exists(reference):
            raise DataError(f"sample {sample_id!r}: {reference!r} is no scene of the tiny world (scene:SEED)")
        return Image.fromarray(render(sample_scene(int(reference.partition(":")[2]))))
