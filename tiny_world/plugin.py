"""The tiny worlds as a plug-in: their recipe formats and benchmarks register when they are imported.

The entry point ``tiny_world`` of the group ``prunetune.plugins`` names this module, as outside packages name theirs.
"""

from prunetune.tiny_world import recipe, task
from prunetune.tiny_world.hard import recipe as hard_recipe
from prunetune.tiny_world.hard import task as hard_task

__all__ = ["hard_recipe", "hard_task", "recipe", "task"]
