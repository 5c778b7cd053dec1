"""The tiny world as a plug-in: its recipe format and its benchmark register when they are imported.

The entry point ``tiny_world`` of the group ``prunetune.plugins`` names this module, as outside packages name theirs.
"""

from prunetune.tiny_world import recipe, task

__all__ = ["recipe", "task"]
