"""What a benchmark is: items, a picture opener, pure scoring functions, and the pairing of saved predictions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.data_recipes.images import ImageOpener
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.predictions import Prediction
from prunetune.names import nearest
from prunetune.plugins import import_folder, load_installed, named

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Item:
    """One question about at most one picture, and what the scorer compares the prediction with (JSON values)."""

    id: str
    source: str
    image: str | None
    question: str
    answer: Any

    def key(self) -> str:
        """Return the item as one line, for hashing."""
        return json.dumps([self.id, self.source, self.image, self.question, self.answer], ensure_ascii=False)


Pair = tuple[str, Item]
"""A prediction's text and its item."""


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: the name of the command line.
        protocol: whose rules it scores by.
        prompt: which variant of the question is asked, in words.
        read: reads all items, in their fixed order, from the folder of its published files.
        images: returns the picture opener for that folder.
        score: compares a prediction with an item, from 0 to 1; None where the answers are hidden, or only a whole
            set has a score.
        about: one line for ``prunetune list tasks``.
        metrics: computes all metrics of the task; None is accuracy in percent.
        answers: reads items for saved predictions, where that takes fewer files than ``read``.
        key: returns the item's id of a saved prediction, given its place for messages; None is the prediction's id.
        keys: the same for all predictions at once, where that takes a file.
        upload: writes the file that the benchmark's server takes.
        failed: the text that stands for a missing prediction, where the published scorer counts it as wrong; None
            makes a missing prediction an error.
        first_counts: whether of several predictions of one question the first counts, as the published scorer has it;
            otherwise a repeated prediction is an error.
        notes: where numbers are defined otherwise than by the published scorer, on purpose.
    """

    name: str
    protocol: str
    prompt: str
    read: Callable[[Path], list[Item]]
    images: Callable[[Path], ImageOpener]
    score: Callable[[str, Item], float] | None
    about: str
    metrics: Callable[[list[Pair]], dict[str, Any]] | None = None
    answers: Callable[[Path], list[Item]] | None = None
    key: Callable[[Prediction, str], str] | None = None
    keys: Callable[[list[Prediction], Path, str], list[str]] | None = None
    upload: Callable[[list[Pair], Path], Path] | None = None
    failed: str | None = None
    first_counts: bool = False
    notes: Sequence[str] = ()

    @property
    def hidden(self) -> bool:
        """Whether the answers are hidden, so that only the benchmark's server can score."""
        return self.score is None and self.metrics is None

    def measure(self, pairs: list[Pair]) -> dict[str, Any]:
        """Return all metrics of some predictions; empty where the answers are hidden."""
        if self.metrics is not None:
            return self.metrics(pairs)
        return {} if self.score is None else {"accuracy": percent(self.score, pairs)}


_TASKS: dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Add a benchmark; raises TaskError if its name is taken."""
    if task.name in _TASKS:
        raise TaskError(f"two tasks are called {task.name!r}")
    _TASKS[task.name] = task
    return task


def tasks() -> dict[str, Task]:
    """Return all benchmarks by name: those of ``evaluation/tasks/`` and of plug-ins."""
    import prunetune.evaluation.tasks as package

    import_folder(package)
    load_installed()
    return dict(sorted(_TASKS.items()))


def get_task(name: str) -> Task:
    """Return the benchmark of a name, or the object that ``package.module:NAME`` names.

    Raises:
        TaskError: if there is none, with the nearest name.
        PluginError: if its module can't be imported.
    """
    if ":" in name:
        task = named(name)
        if not isinstance(task, Task):
            raise TaskError(f"{name!r} is no benchmark but {type(task).__name__}; it is what register_task returns")
        return task
    known = tasks()
    if name not in known:
        raise TaskError(f"unknown task {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return known[name]


UNSET = Path("<data is not set>")
"""Stands for the folder of tasks that need none; what a task that needs one says is missing there."""


def task_folder(data: str | Path | None, name: str) -> Path:
    """Return the folder of a task's files: ``data/NAME``, its first word ``data/textvqa`` for textvqa_no_ocr, or data.

    Without ``data`` it is :data:`UNSET`, where nothing is found.

    Raises:
        TaskError: if ``data`` is set and no folder.
    """
    if data is None:
        return UNSET
    root = Path(data)
    if not root.is_dir():
        raise TaskError(f"data folder {str(root)!r} does not exist; set data to the folder of the benchmarks' files")
    return next((root / part for part in (name, name.split("_")[0]) if (root / part).is_dir()), root)


def items_hash(items: list[Item]) -> str:
    """Return a SHA-256 of items in their order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(item.key().encode() + b"\n")
    return digest.hexdigest()


def percent(score: Callable[[str, Item], float], pairs: Sequence[Pair]) -> float | None:
    """Return the mean score in percent; None of no pairs."""
    return 100 * sum(score(prediction, item) for prediction, item in pairs) / len(pairs) if pairs else None


def by_source(score: Callable[[str, Item], float], pairs: Sequence[Pair]) -> dict[str, float | None]:
    """Return the mean score in percent of each source."""
    sources = sorted({item.source for _, item in pairs})
    return {source: percent(score, [pair for pair in pairs if pair[1].source == source]) for source in sources}


def image_folder(data: Path, name: str) -> Path:
    """Return the folder of the pictures: ``name`` in or below the task's folder, or that folder itself."""
    if (data / name).is_dir():
        return data / name
    found = sorted(path for path in data.rglob(name) if path.is_dir())
    return found[0] if found else data
