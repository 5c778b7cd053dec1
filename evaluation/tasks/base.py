"""What a benchmark is: items, a picture opener, and a pure scoring function."""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from data_recipes.images import ImageOpener
from pruning.registry import nearest


class TaskError(ValueError):
    """A benchmark that does not exist or whose files can't be used."""


@dataclass(frozen=True)
class Item:
    """One question about one picture, and what the scorer compares the prediction with."""

    id: str
    source: str
    image: str
    question: str
    answer: str

    def key(self) -> str:
        """Return the item as one line, for hashing."""
        return json.dumps([self.id, self.source, self.image, self.question, self.answer], ensure_ascii=False)


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: the name of the command line.
        protocol: whose rules it scores by.
        prompt: which variant of the question is asked, in words.
        items: reads all items in their fixed order.
        images: returns the picture opener.
        score: compares a prediction with an item, from 0 to 1.
        about: one line for ``prunetune list tasks``.
    """

    name: str
    protocol: str
    prompt: str
    items: Callable[[], list[Item]]
    images: Callable[[], ImageOpener]
    score: Callable[[str, Item], float]
    about: str


_TASKS: dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Add a benchmark; raises TaskError if its name is taken."""
    if task.name in _TASKS:
        raise TaskError(f"two tasks are called {task.name!r}")
    _TASKS[task.name] = task
    return task


def tasks() -> dict[str, Task]:
    """Return all benchmarks by name, importing every file of ``evaluation/tasks/`` once."""
    import evaluation.tasks as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"evaluation.tasks.{module.name}")
    return dict(sorted(_TASKS.items()))


def get_task(name: str) -> Task:
    """Return a benchmark; raises TaskError with the nearest name if there is none."""
    known = tasks()
    if name not in known:
        raise TaskError(f"unknown task {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return known[name]


def items_hash(items: list[Item]) -> str:
    """Return a SHA-256 of items in their order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(item.key().encode() + b"\n")
    return digest.hexdigest()
