"""One file per benchmark, with every layout its files come in; a file that registers a benchmark adds it."""

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.tasks.base import Benchmark, Item, Scored, Scorer, get_task, register_task, tasks

__all__ = ["Benchmark", "Item", "Scored", "Scorer", "TaskError", "get_task", "register_task", "tasks"]
