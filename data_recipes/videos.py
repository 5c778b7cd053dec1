"""Opening videos: files through PyAV, animated images, and folders of frames."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from prunetune.data_recipes.images import (
    Album,
    FolderImages,
    ImageOpener,
    StoredImages,
    TooLarge,
    check_inside,
    leaves_root,
    pad_to_square,
)
from prunetune.data_recipes.presence import missing_files
from prunetune.data_recipes.sample import DataError
from prunetune.data_recipes.sampling import VideoSampling
from prunetune.reading import one_line, shown

VIDEO = "video:"
"""Begins a sample's reference to a video; all others are references to images."""
FILES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts", ".3gp")
ANIMATIONS = (".gif", ".webp", ".png", ".apng")
FRAMES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Clip:
    """The frames of a video that are looked at.

    Attributes:
        frames: RGB, in order of time, all of one size.
        indices: which of the video's frames they are.
        total: how many frames the video has.
        rate: its frames per second; None if nobody knows.
        seconds: how long it is, or the part of it that is looked at; None if nobody knows.
    """

    frames: tuple[Image.Image, ...]
    indices: tuple[int, ...]
    total: int
    rate: float | None = None
    seconds: float | None = None


def read_clip(
    path: Path,
    sampling: VideoSampling,
    what: str,
    images: StoredImages | None = None,
    span: tuple[float, float] | None = None,
) -> Clip:
    """Return the frames of a video that are looked at.

    Args:
        path: a video file, an animated image, or a folder of frames, whose names are in order of time.
        sampling: which frames.
        what: the sample and the video, for messages.
        images: decodes frames in folders, and says how large a frame may be.
        span: from which second to which one it is looked at; None is the whole video.

    Raises:
        DataError: if it is missing, empty, of an unknown kind, can't be decoded, or PyAV is not installed.
    """
    images = images or StoredImages()
    choose = _Choice(sampling, span, what)
    suffix = path.suffix.lower()
    if path.is_dir():
        clip = _of_folder(path, choose, images)
    elif not path.is_file():
        raise DataError(f"{what} is missing")
    elif suffix in ANIMATIONS:
        clip = _of_animation(path, choose, images)
    elif suffix in FILES:
        clip = _of_file(path, choose, images)
    else:
        kinds = ", ".join((*FILES, *ANIMATIONS))
        raise DataError(f"{what} is no video: expected a folder of frames, or {kinds}, got {suffix or 'no suffix'!r}")
    size = clip.frames[0].size
    if any(frame.size != size for frame in clip.frames):
        raise DataError(f"{what} has frames of different sizes, the first of {size[0]} x {size[1]}")
    return clip


@dataclass(frozen=True)
class _Choice:
    """Which frames of one video are looked at, and what to call it in messages."""

    sampling: VideoSampling
    span: tuple[float, float] | None
    what: str

    def indices(self, total: int, rate: float | None) -> list[int]:
        """Return which of ``total`` frames they are."""
        if self.sampling.fps is not None and rate is None:
            raise DataError(
                f"{self.what} does not say how many frames a second has; set frame_rate, or frames instead of fps"
            )
        if self.span is None:
            return self.sampling.indices(total, rate)
        if rate is None:
            raise DataError(
                f"{self.what} is asked about from second {self.span[0]:g} to {self.span[1]:g}, and does not say how "
                "many frames a second has; set frame_rate"
            )
        first = min(max(int(self.span[0] * rate), 0), total - 1)
        last = min(max(int(self.span[1] * rate), first), total - 1)
        return [first + index for index in self.sampling.indices(last - first + 1, rate)]

    def clip(self, frames: Sequence[Image.Image], indices: Sequence[int], total: int, rate: float | None) -> Clip:
        """Return what was found; its length is that of the span."""
        seconds = None if rate is None else total / rate
        if self.span is not None and seconds is not None:
            seconds = min(seconds, self.span[1]) - min(seconds, self.span[0])
        return Clip(tuple(frames), tuple(indices), total, rate, seconds)


def _of_folder(path: Path, choose: _Choice, images: StoredImages) -> Clip:
    what, rate = choose.what, choose.sampling.frame_rate
    files = [file for file in path.iterdir() if file.suffix.lower() in FRAMES]
    if not files:
        raise DataError(f"{what} has no frames: expected images ({', '.join(FRAMES)}) in the folder")
    files.sort(key=_by_number)
    indices = choose.indices(len(files), rate)
    frames = [images.decode(files[index], f"{what}: frame {files[index].name}") for index in indices]
    return choose.clip(frames, indices, len(files), rate)


def _by_number(file: Path) -> list[tuple[bool, int, str]]:
    """Return what sorts ``frame_10`` behind ``frame_9``."""
    parts = []
    for part in re.split(r"(\d+)", file.stem):
        parts.append((part.isdigit(), int(part) if part.isdigit() else 0, part))
    return parts


def _of_animation(path: Path, choose: _Choice, images: StoredImages) -> Clip:
    what = choose.what
    with _decoding(what), Image.open(path) as file:
        images.check_size(file, what)
        total = getattr(file, "n_frames", 1)
        milliseconds = 0.0
        for index in range(total):
            file.seek(index)
            milliseconds += file.info.get("duration", 0)
        rate = 1000 * total / milliseconds if milliseconds else None
        indices = choose.indices(total, rate)
        frames = []
        for index in indices:
            file.seek(index)
            frames.append(file.convert("RGB"))
    return choose.clip(frames, indices, total, rate)


def _of_file(path: Path, choose: _Choice, images: StoredImages) -> Clip:
    what = choose.what
    try:
        import av
    except ImportError as error:
        raise DataError(
            f"{what} needs PyAV to be read ({one_line(error)}): pip install 'prunetune[video]', or give folders of "
            "frames"
        ) from None
    with _decoding(what), av.open(str(path)) as container:
        if not container.streams.video:
            raise DataError(f"{what} has no pictures in it")
        stream = container.streams.video[0]
        if stream.width * stream.height > images.max_pixels:
            raise TooLarge(
                f"{what} has {stream.width:,} x {stream.height:,} pixels a frame, max_pixels is {images.max_pixels:,}"
            )
        rate = _positive(stream.average_rate)
        total = stream.frames
    if total:
        clip = _decoded(av, path, choose, total, rate)
        if clip is not None:
            return clip
    # What the file says is missing or more than there is: count by decoding.
    with _decoding(what), av.open(str(path)) as container:
        total = sum(1 for _ in container.decode(video=0))
    if not total:
        raise DataError(f"{what} has no frames")
    found = _decoded(av, path, choose, total, rate)
    if found is None:
        raise DataError(f"{what} can't be decoded (another number of frames each time); replace the file")
    return found


def _decoded(av: Any, path: Path, choose: _Choice, total: int, rate: float | None) -> Clip | None:
    """Return the frames that are looked at of a file with ``total``, or None if it has fewer."""
    indices = choose.indices(total, rate)
    wanted = set(indices)
    frames = []
    with _decoding(choose.what), av.open(str(path)) as container:
        # From the first to the last wanted: seeking lands where the codec likes, and the same frames must come always.
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                frames.append(frame.to_image().convert("RGB"))
            if index >= indices[-1]:
                break
    return choose.clip(frames, indices, total, rate) if len(frames) == len(indices) else None


def _positive(rate: Fraction | None) -> float | None:
    return float(rate) if rate else None


@contextmanager
def _decoding(what: str) -> Iterator[None]:
    """Raise DataError for whatever a decoder raises."""
    try:
        yield
    except DataError:
        raise
    # Pillow's and FFmpeg's decoders raise nearly anything for a broken file.
    except Exception as error:
        raise DataError(f"{what} can't be decoded ({one_line(error)}); replace the file") from error


class FolderVisuals(FolderImages):
    """Images and videos below a root folder; a reference that begins with ``VIDEO`` is a video's."""

    def __init__(self, root: str | Path | None, sampling: VideoSampling | None = None) -> None:
        super().__init__(root)
        self.sampling = sampling or VideoSampling()

    def exists(self, reference: str) -> bool:
        """Return whether the file is there, or the folder of a video's frames."""
        if not reference.startswith(VIDEO):
            return super().exists(reference)
        return self._video_exists(reference.removeprefix(VIDEO))

    def missing(self, references: Sequence[str]) -> set[str]:
        """Return which of the references, each given once, are not there."""
        images = [reference for reference in references if not reference.startswith(VIDEO)]
        videos = [reference.removeprefix(VIDEO) for reference in references if reference.startswith(VIDEO)]
        missing = super().missing(images)
        if videos:
            found = missing_files(self.root, videos, self._video_exists, or_folder=True)
            missing |= {f"{VIDEO}{path}" for path in found}
        return missing

    def _video_exists(self, path: str) -> bool:
        return FolderImages.exists(self, path) or (not leaves_root(path) and (self.root / path).is_dir())

    def open(self, reference: str, sample_id: str) -> Any:
        """Return the decoded RGB image, or the clip."""
        if not reference.startswith(VIDEO):
            return super().open(reference, sample_id)
        path = reference.removeprefix(VIDEO)
        check_inside(path, f"sample {sample_id!r}")
        return read_clip(self.root / path, self.sampling, f"sample {sample_id!r}: video {self.root / path}", self)


class NamedVideos(StoredImages):
    """Videos found by name in or below a folder, whatever their suffix: ``v_1`` is ``v_1.mp4`` or the folder ``v_1``.

    A reference may end in a part of the video in seconds, ``v_1#t=2.5,9``.

    Args:
        root: the folder.
        within: folders below it to look in first, such as "videos"; where one is there, nowhere else is looked.
    """

    def __init__(self, root: Path, within: Sequence[str] = ()) -> None:
        self.sampling = VideoSampling()
        self.root = root
        for name in within:
            if (root / name).is_dir():
                self.root = root / name
                break
        self._found: dict[str, Path] | None = None

    def exists(self, reference: str) -> bool:
        """Return whether there is such a video."""
        return self._path(reference) is not None

    def open(self, reference: str, sample_id: str) -> Any:
        """Return the clip."""
        path, span = self._path(reference), _span(reference)
        if path is None:
            raise DataError(
                f"sample {sample_id!r}: video {shown(reference)} is nowhere below {self.root}; put the benchmark's "
                "videos there, or folders of their frames"
            )
        return read_clip(path, self.sampling, f"sample {sample_id!r}: video {path}", self, span)

    def _path(self, reference: str) -> Path | None:
        reference = reference.partition(_PART)[0]
        check_inside(reference, f"video {shown(reference)}")
        exact = self.root / reference
        if exact.exists():
            return exact
        if self._found is None:
            self._found = _videos_below(self.root)
        return self._found.get(reference) or self._found.get(Path(reference).stem)


_PART = "#t="


def part_of(reference: str, start: float, end: float) -> str:
    """Return the reference of a part of a video, from one second to another, as web addresses write it."""
    return f"{reference}{_PART}{start:g},{end:g}"


def _span(reference: str) -> tuple[float, float] | None:
    part = reference.partition(_PART)[2]
    if not part:
        return None
    start, _, end = part.partition(",")
    return float(start), float(end)


def _videos_below(root: Path) -> dict[str, Path]:
    """Return videos and folders of frames by their names with and without suffix; the first of a name counts."""
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in (*FILES, *ANIMATIONS[:2]):
            found.setdefault(path.stem, path)
            found.setdefault(path.name, path)
        elif path.is_dir():
            found.setdefault(path.name, path)
    return found


def sampled(images: ImageOpener, sampling: VideoSampling) -> ImageOpener:
    """Return an opener that looks at other frames of its videos; one that opens no videos is returned as it is."""
    if not hasattr(images, "sampling"):
        return images
    own = copy.copy(images)
    own.sampling = sampling
    return own


def squared(opened: Image.Image | Album | Clip, color: tuple[int, int, int]) -> Image.Image | Album | Clip:
    """Return a picture, or those of an album or a clip, padded to a square.

    Args:
        opened: what a sample is about.
        color: of the padding.
    """
    if isinstance(opened, Clip):
        return replace(opened, frames=tuple(pad_to_square(frame, color) for frame in opened.frames))
    if isinstance(opened, Album):
        return replace(opened, images=tuple(pad_to_square(image, color) for image in opened.images))
    return pad_to_square(opened, color)
