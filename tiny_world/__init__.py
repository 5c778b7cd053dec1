"""The tiny world: procedural scenes with questions that imitate VG, GQA and TextVQA.

A scene is an integer seed. ``sample_scene(seed)`` places 3 to 5 shapes, and mostly a two-digit number, on a
3 x 3 board; ``render`` draws it at 84 x 84 px; ``ask`` poses eight questions with one-phrase answers.
"""

if __name__ != "prunetune.tiny_world":
    raise ImportError("import prunetune.tiny_world, not tiny_world: a second name would load everything twice")

from prunetune.tiny_world.questions import Question, ask, drill, vocabulary
from prunetune.tiny_world.scene import (
    CELL_PIXELS,
    IMAGE_PIXELS,
    PATCH_PIXELS,
    SPLITS,
    Scene,
    render,
    sample_scene,
    split_seeds,
)

__all__ = [
    "CELL_PIXELS",
    "IMAGE_PIXELS",
    "PATCH_PIXELS",
    "SPLITS",
    "Question",
    "Scene",
    "ask",
    "drill",
    "render",
    "sample_scene",
    "split_seeds",
    "vocabulary",
]
