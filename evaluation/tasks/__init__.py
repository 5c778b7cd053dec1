"""One file per benchmark; a file that registers a task adds it."""

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.tasks.base import Item, Task, get_task, register_task, tasks

__all__ = ["Item", "Task", "TaskError", "get_task", "register_task", "tasks"]
