"""The images of benchmarks as a feature cache holds them: each by its benchmark and its own name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prunetune.data_recipes import Sample, Turn
from prunetune.data_recipes.images import Album, limited
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.tasks import Item, get_task
from prunetune.evaluation.tasks.base import Questions, task_folder
from prunetune.models.features import FeatureData


def sample_of(item: Item) -> Sample:
    """Return what is asked of an item: its question without an answer."""
    return Sample(item.id, item.source, item.image, (Turn(item.question, None),))


def within(task: str, sample: Sample) -> Sample:
    """Return a sample whose image is named together with its benchmark: those of two may have one name."""
    return sample if sample.image is None else replace(sample, image=f"{task}/{sample.image}")


@dataclass(frozen=True)
class TaskSamples:
    """The items of some benchmarks one after another, as often as they are asked for."""

    items: Mapping[str, Sequence[Item]]

    def __iter__(self) -> Iterator[Sample]:
        for task, items in self.items.items():
            for item in items:
                yield within(task, sample_of(item))


class TaskImages:
    """Opens images of several benchmarks, whose openers are made when they are first used."""

    def __init__(self, questions: Mapping[str, Questions], max_pixels: int) -> None:
        self.questions = questions
        self.max_pixels = max_pixels
        self._openers: dict[str, Any] = {}

    def exists(self, reference: str) -> bool:
        """Return whether the image is there."""
        task, _, own = reference.partition("/")
        return bool(self._opener(task).exists(own))

    def open(self, reference: str, sample_id: str) -> Any:
        """Return the image."""
        task, _, own = reference.partition("/")
        opened = self._opener(task).open(own, sample_id)
        if isinstance(opened, Album):
            raise TaskError(f"{task} asks about several images at once, of which no features are stored; run without")
        return opened

    def _opener(self, task: str) -> Any:
        if task not in self._openers:
            self._openers[task] = limited(self.questions[task].open_images(), self.max_pixels)
        return self._openers[task]


def feature_data(
    tasks: Sequence[str], folder: str | None, limit: int | None, max_pixels: int, questions: dict[str, Questions] | None
) -> FeatureData:
    """Return the images of some benchmarks.

    Args:
        tasks: their names.
        folder: of their published files.
        limit: first items of each alone.
        max_pixels: the largest image that is decoded.
        questions: of each, if they were read already.

    Raises:
        TaskError: if they can't be read, or ask about videos.
    """
    moving = [name for name in tasks if get_task(name).video]
    if moving:
        raise TaskError(f"{', '.join(moving)} ask about videos, of which no features are stored; run without features")
    if questions is None:
        questions = {name: get_task(name).open(task_folder(folder, name)) for name in tasks}
    items = {name: own.items[:limit] for name, own in questions.items()}
    return FeatureData(", ".join(tasks), TaskSamples(items), TaskImages(questions, max_pixels))
