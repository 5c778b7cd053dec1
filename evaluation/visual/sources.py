"""What is drawn: questions of a benchmark, or one question about images and videos of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from prunetune.configs import VisualizeConfig
from prunetune.data_recipes import Sample, Turn
from prunetune.data_recipes.images import HERE, IMAGE_FILES, ImageOpener, StoredImages, limited
from prunetune.data_recipes.sampling import VideoSampling
from prunetune.data_recipes.videos import ANIMATIONS, FILES, VIDEO, read_clip, sampled
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.run.features import sample_of
from prunetune.evaluation.tasks import Benchmark, Item, get_task
from prunetune.evaluation.tasks.base import task_folder
from prunetune.names import nearest


@dataclass(frozen=True)
class Asked:
    """A question about an image or a video.

    Attributes:
        sample: as a formatter takes it.
        images: opens the image or video.
        video: whether it is a video.
        task: the benchmark it is of; None for the user's own.
        item: the benchmark's.
    """

    sample: Sample
    images: ImageOpener
    video: bool
    task: Benchmark | None = None
    item: Item | None = None

    @property
    def question(self) -> str:
        """What is asked, with a word where an image of several belongs."""
        return self.sample.turns[0].question.replace(HERE, "[image]")

    def score(self, answer: str) -> float | None:
        """Return an answer's score from 0 to 1; None where nobody knows the right one."""
        if self.task is None or self.item is None:
            return None
        return self.task.score(answer, self.item).score


def asked_of(config: VisualizeConfig) -> list[Asked]:
    """Return what is drawn, at most ``count``.

    Raises:
        TaskError: if the benchmark or one of its questions is not there, or a file is not.
    """
    if config.task is not None:
        return _of_task(config, get_task(config.task))
    assert config.question is not None  # the schema asks for it
    return _own(config.images, config.videos, config.question, config.max_pixels, config.video)[: config.count]


def _of_task(config: VisualizeConfig, task: Benchmark) -> list[Asked]:
    questions = task.open(task_folder(config.data, task.name))
    images = sampled(limited(questions.open_images(), config.max_pixels), config.video)
    if config.ids:
        items = [_item(questions.items, name, task) for name in config.ids]
    else:
        items = _first_questions(questions.items)[: config.count]
    return [Asked(sample_of(item), images, task.video, task, item) for item in items]


def _item(items: list[Item], name: str, task: Benchmark) -> Item:
    for item in items:
        if item.id == name:
            if item.image is None:
                raise TaskError(f"question {name!r} of {task.name} has no image to draw; choose another")
            return item
    raise TaskError(f"{task.name} has no question {name!r}{nearest(name, [item.id for item in items])}")


def _first_questions(items: list[Item]) -> list[Item]:
    """Return the first question about each image, since methods that read the question need one."""
    first: dict[str, Item] = {}
    for item in items:
        if item.image is not None:
            first.setdefault(item.image, item)
    return list(first.values())


class OwnFiles(StoredImages):
    """Opens the user's own files by their paths; a reference that begins with ``VIDEO`` is a video's."""

    def __init__(self, max_pixels: int, sampling: VideoSampling) -> None:
        self.max_pixels = max_pixels
        self.sampling = sampling

    def exists(self, reference: str) -> bool:
        """Return whether the file is there, or the folder of a video's frames."""
        return Path(reference.removeprefix(VIDEO)).exists()

    def open(self, reference: str, sample_id: str) -> Any:
        """Return the decoded RGB image, or the clip."""
        path = Path(reference.removeprefix(VIDEO))
        if reference.startswith(VIDEO):
            return read_clip(path, self.sampling, f"video {path}", self)
        return self._image(path)

    def _image(self, path: Path) -> Image.Image:
        return self.decode(path, f"image {path}")


def _own(images: list[str], videos: list[str], question: str, max_pixels: int, sampling: VideoSampling) -> list[Asked]:
    opener = OwnFiles(max_pixels, sampling)
    found = [(str(file), False) for name in images for file in _files(name)]
    found += [(f"{VIDEO}{name}", True) for name in videos]
    asked = []
    for reference, video in found:
        if not opener.exists(reference):
            kind = "video" if video else "image"
            raise TaskError(f"{kind} {reference.removeprefix(VIDEO)} is missing; check the path")
        # A name that is no UTF-8 stays readable, and can be written.
        name = Path(reference.removeprefix(VIDEO)).name.encode(errors="replace").decode()
        asked.append(Asked(Sample(name, "own", reference, (Turn(question, None),)), opener, video))
    return asked


def _files(name: str) -> list[Path]:
    """Return a file, or the images in a folder, sorted by name.

    Raises:
        TaskError: for a folder without images, and a file of videos.
    """
    path = Path(name)
    if not path.is_dir():
        if path.suffix.lower() in (*FILES, *ANIMATIONS[:1]):
            raise TaskError(f"image {name} is a video; give it as a video (--video {name})")
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_FILES)
    if not files:
        raise TaskError(f"folder {name} holds no images ({', '.join(IMAGE_FILES)}); give files, or another folder")
    return files
