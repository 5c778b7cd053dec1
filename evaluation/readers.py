"""Readers, one per layout that a benchmark's files come in; here the one for files as their authors publish them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from prunetune.data_recipes.images import FolderImages
from prunetune.data_recipes.videos import NamedVideos

if TYPE_CHECKING:
    from prunetune.data_recipes.images import ImageOpener
    from prunetune.evaluation.tasks.base import Item


# Reading says itself whether the layout is there, see Benchmark.open; an outside benchmark needs these three alone.
class Reader(Protocol):
    """One layout that a benchmark's files come in.

    A folder holds the layout if reading it raises no :class:`MissingFile`; the next reader is tried if it does.
    """

    def read(self, data: Path) -> list[Item]:
        """Return all items in their fixed order."""
        ...

    def read_answers(self, data: Path) -> list[Item]:
        """Return the items to score saved predictions against, whose questions need not be as they were asked."""
        ...

    def open_images(self, data: Path) -> ImageOpener:
        """Return what opens the items' images."""
        ...


@dataclass(frozen=True)
class PublishedFiles:
    """The layout in which a benchmark's authors publish it.

    Attributes:
        items: reads the items from a folder.
        images: opens the images in that folder.
        answers: reads the items for saved predictions, where that takes fewer files.
    """

    items: Callable[[Path], list[Item]]
    images: Callable[[Path], ImageOpener]
    answers: Callable[[Path], list[Item]] | None = None

    def read(self, data: Path) -> list[Item]:
        """Return all items in their fixed order."""
        return self.items(data)

    def read_answers(self, data: Path) -> list[Item]:
        """Return the items to score saved predictions against."""
        # Whoever scores answers made elsewhere has the annotations, and seldom LLaVA's files of prompts.
        return self.items(data) if self.answers is None else self.answers(data)

    def open_images(self, data: Path) -> ImageOpener:
        """Return what opens the items' images."""
        return self.images(data)


def images_below(name: str) -> Callable[[Path], FolderImages]:
    """Return an opener of images that lie in a folder called ``name`` in or below the data, or in the data itself."""

    # The path is known when an arm runs, the name when the benchmark is written: hence a function of one and the other.
    def open_images(data: Path) -> FolderImages:
        if (data / name).is_dir():
            return FolderImages(data / name)
        # Archives put it at different depths (images/, coco/val2014/). The first by name: a file system's own order
        # differs between machines, and two arms would then see different images.
        for path in sorted(data.rglob(name)):
            if path.is_dir():
                return FolderImages(path)
        # Whoever has one benchmark alone often puts the images beside its annotations.
        return FolderImages(data)

    return open_images


def videos_below(*names: str) -> Callable[[Path], NamedVideos]:
    """Return an opener of videos that lie in a folder called one of ``names`` below the data, or anywhere below it."""

    def open_videos(data: Path) -> NamedVideos:
        return NamedVideos(data, names)

    return open_videos


def number_repeats(names: Iterable[str]) -> list[str]:
    """Return names as ids: of several that are the same, the second becomes ``NAME#2``, and so on."""
    # In the order of the file, and so for questions as for predictions: the second answer meets the second question.
    seen: Counter[str] = Counter()
    ids = []
    for name in names:
        seen[name] += 1
        ids.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return ids
