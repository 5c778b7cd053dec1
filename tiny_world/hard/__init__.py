"""The harder tiny world: 6 to 9 objects on a 4 x 4 board, named by up to three words, counted and compared.

A scene is an integer seed, as in the tiny world, but another one. ``sample_hard_scene(seed)`` places the objects and
mostly a two-digit number; ``render_hard`` draws it at 96 x 96 px; ``ask_hard`` poses ten questions.
"""

from prunetune.tiny_world.hard.questions import HardQuestion, ask_hard, drill_hard, hard_vocabulary
from prunetune.tiny_world.hard.scene import render_hard, sample_hard_scene

__all__ = ["HardQuestion", "ask_hard", "drill_hard", "hard_vocabulary", "render_hard", "sample_hard_scene"]
