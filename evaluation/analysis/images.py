"""The images that are looked at: those of benchmarks, each with its first question, and a folder of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prunetune.configs import AnalyzeConfig
from prunetune.data_recipes import Sample
from prunetune.data_recipes.images import IMAGE_FILES, FolderImages, ImageOpener, limited
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.run.features import sample_of
from prunetune.evaluation.tasks import Benchmark, Item, get_task
from prunetune.evaluation.tasks.base import items_hash, task_folder


@dataclass(frozen=True)
class Dataset:
    """Some images.

    Attributes:
        name: the benchmark's, or the folder's.
        items: one for each image, its first question: methods that read the question need one.
        images: opens them.
        sources: for each image the parts of the benchmark that ask about it.
        task: the benchmark; None of a folder.
    """

    name: str
    items: list[Item]
    images: ImageOpener
    sources: Mapping[str, tuple[str, ...]]
    task: Benchmark | None = None

    @property
    def hash(self) -> str:
        """SHA-256 of the items in their order."""
        return items_hash(self.items)

    def samples(self, items: list[Item]) -> list[Sample]:
        """Return what is asked about some of the images."""
        return [sample_of(item) for item in items]


def datasets_of(config: AnalyzeConfig) -> list[Dataset]:
    """Return the images of every benchmark and of the folder.

    Raises:
        TaskError: for a benchmark about videos or several images at once, or one or a folder without images.
    """
    found = [_of_task(name, config) for name in config.tasks]
    if config.images is not None:
        found.append(_of_folder(Path(config.images), config))
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise TaskError(f"the folder {config.images} is called as a benchmark is; rename it")
    return found


def _of_task(name: str, config: AnalyzeConfig) -> Dataset:
    task = get_task(name)
    if not task.storable:
        asks = "videos" if task.video else "several images at once"
        raise TaskError(f"{name} asks about {asks}, and single images are analysed; choose a task about images")
    questions = task.open(task_folder(config.data, name))
    first: dict[str, Item] = {}
    sources: dict[str, dict[str, None]] = {}
    for item in questions.items:
        if item.image is None:
            continue
        if len(first) == config.limit and item.image not in first:
            continue
        first.setdefault(item.image, item)
        sources.setdefault(item.image, {})[item.source] = None
    if not first:
        raise TaskError(f"{name} asks about no image; choose a task about images")
    images = limited(questions.open_images(), config.max_pixels)
    return Dataset(name, list(first.values()), images, {image: tuple(own) for image, own in sources.items()}, task)


def _of_folder(folder: Path, config: AnalyzeConfig) -> Dataset:
    if not folder.is_dir():
        raise TaskError(f"images {str(folder)!r} is no folder; set images to a folder of image files")
    kinds = (*IMAGE_FILES, ".gif")  # of which the first picture is looked at
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds and path.is_file())
    if not paths:
        raise TaskError(f"{folder} holds no image; expected files that end in {', '.join(kinds)}")
    name = folder.resolve().name
    items = []
    for path in paths[: config.limit]:
        reference = path.relative_to(folder).as_posix()
        try:
            reference.encode()
        except UnicodeEncodeError:  # tables could not name it, after all images were looked at
            raise TaskError(f"the name of the file {reference!r} in {folder} is not UTF-8; rename it") from None
        items.append(Item(reference, name, reference, config.question, None))
    images = limited(FolderImages(folder), config.max_pixels)
    return Dataset(name, items, images, {str(item.image): (name,) for item in items})
