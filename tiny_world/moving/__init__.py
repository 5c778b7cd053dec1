"""The moving tiny world: clips of four frames in which one shape crosses the board and another appears.

A clip is an integer seed, as a scene is. What its questions ask for is in no single frame: which way the shape goes,
where it starts and ends, what appears.
"""

from prunetune.tiny_world.moving.clip import FRAMES, Clip, render_clip, sample_clip
from prunetune.tiny_world.moving.questions import WORDS, ask_clip

__all__ = ["FRAMES", "WORDS", "Clip", "ask_clip", "render_clip", "sample_clip"]
