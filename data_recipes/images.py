"""Opening images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any, Protocol

from PIL import Image

from prunetune.data_recipes.presence import missing_files
from prunetune.data_recipes.sample import DataError
from prunetune.reading import one_line, shown

MAX_PIXELS = 50_000_000
"""Largest image that is decoded where nothing else is asked for: as RGB it takes 150 MB."""

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Files of a user's folder that count as images; a ``.gif`` is a video here."""


class ImageOpener(Protocol):
    """Turns a sample's image reference into an image."""

    def exists(self, reference: str) -> bool:
        """Return whether the image is there, without decoding it."""
        ...

    def open(self, reference: str, sample_id: str) -> Any:
        """Return the RGB image, the ``Album`` of several or the ``Clip`` of a video.

        Raises DataError naming the sample if it can't.
        """
        ...


@dataclass(frozen=True)
class Counted:
    """An image that is known already: only its size and its places in the text matter.

    Attributes:
        size: width and height.
        places: how many places it gets.
    """

    size: tuple[int, int]
    places: int

    def blank(self) -> Image.Image:
        """Return a black image of this size, for processors that count places themselves."""
        return Image.new("RGB", self.size)


HERE = "\ufffc"
"""Stands in a question where an image of its album belongs (Unicode's own sign for it)."""


@dataclass(frozen=True)
class Album:
    """The images of a sample that has several; each is pruned to the budget by itself.

    Where the question holds :data:`HERE` once for each, they stand in those places, and otherwise before the question.
    """

    images: tuple[Image.Image, ...]

    def placed(self, question: str) -> list[dict[str, Any]]:
        """Return question and images in their order, as chat templates read them."""
        images = [{"type": "image", "image": image} for image in self.images]
        texts = question.split(HERE)
        if len(texts) != len(images) + 1:
            return [*images, {"type": "text", "text": question.replace(HERE, "")}]
        parts: list[dict[str, Any]] = []
        for text, image in zip(texts[:-1], images, strict=True):
            if text:
                parts.append({"type": "text", "text": text})
            parts.append(image)
        # Templates look at the last part for the question, which may be empty.
        return [*parts, {"type": "text", "text": texts[-1]}]


@dataclass(frozen=True)
class Dialogue(Album):
    """A conversation as somebody else wrote it: a system message, images in any turn, text before or behind them.

    Attributes:
        images: in reading order.
        messages: as chat templates read them; a part ``{"type": "image"}`` is the place of the next image.
    """

    messages: tuple[dict[str, Any], ...] = ()

    def whole(self) -> list[dict[str, Any]]:
        """Return the messages with the images in their places."""
        images = iter(self.images)
        messages = []
        for message in self.messages:
            parts = []
            for part in message["content"]:
                parts.append({"type": "image", "image": next(images)} if part["type"] == "image" else part)
            if parts[-1]["type"] == "image":
                parts.append({"type": "text", "text": ""})  # as of albums: templates look at the last part
            messages.append({**message, "content": parts})
        return messages


class TooLarge(DataError):
    """An image with more pixels than are decoded."""


class StoredImages:
    """Base of what opens stored images.

    Attributes:
        max_pixels: the largest that it decodes.
        formats: which it decodes, by Pillow's names; None is all that Pillow reads.
    """

    max_pixels: int = MAX_PIXELS
    formats: tuple[str, ...] | None = None

    def decode(self, source: Path | IO[bytes], what: str) -> Image.Image:
        """Return the decoded RGB image.

        Args:
            source: a file or its content.
            what: the sample and the image, for messages.

        Raises:
            TooLarge: if it has more than ``max_pixels``; its head alone is read then.
            FileNotFoundError: if there is no such file.
            DataError: if it can't be decoded.
        """
        try:
            with Image.open(source, formats=self.formats) as image:
                self.check_size(image, what)
                return image.convert("RGB")  # decodes: open() alone reads the head
        except (TooLarge, FileNotFoundError):
            raise
        except Image.DecompressionBombError as error:  # Pillow's own limit, which ours can't raise
            raise TooLarge(f"{what} can't be decoded ({one_line(error)}); make it smaller") from error
        # Pillow's decoders raise nearly anything for a broken file, struct.error and KeyError among it.
        except Exception as error:
            raise DataError(f"{what} can't be decoded ({one_line(error)}); replace the file") from error

    def size_in(self, source: Path | IO[bytes], what: str) -> tuple[int, int]:
        """Return width and height of an image, of which the head alone is read.

        Args:
            source: a file or its content.
            what: the sample and the image, for messages.

        Raises:
            DataError: if it is none, or is not there.
        """
        try:
            with Image.open(source) as image:
                return image.size
        except Exception as error:  # as in decode
            raise DataError(f"{what} can't be read ({one_line(error)}); replace the file") from error

    def check_size(self, image: Image.Image, what: str) -> None:
        """Raise TooLarge for an image with more than ``max_pixels``."""
        pixels = image.width * image.height
        if pixels > self.max_pixels:
            raise TooLarge(
                f"{what} has {image.width:,} x {image.height:,} = {pixels:,} pixels, max_pixels is "
                f"{self.max_pixels:,}; make it smaller, or raise max_pixels"
            )


def limited(images: ImageOpener, max_pixels: int | None) -> ImageOpener:
    """Return an opener that decodes no image above ``max_pixels``; one that stores no images is returned as it is."""
    if max_pixels is None or not isinstance(images, StoredImages):
        return images
    own = copy.copy(images)
    own.max_pixels = max_pixels
    return own


class FolderImages(StoredImages):
    """Images below a root folder. A link in it may lead anywhere, since data sets are often linked; a path may not.

    Raises:
        DataError: if the root is not set or not a folder.
    """

    def __init__(self, root: str | Path | None) -> None:
        if root is None:
            raise DataError(
                "this recipe reads image files; set data.image_root to the folder that holds vg/, gqa/, ..."
            )
        if not Path(root).is_dir():
            raise DataError(f"data.image_root {str(root)!r} is not a folder")
        self.root = Path(root)

    def exists(self, reference: str) -> bool:
        """Return whether the file is there."""
        try:
            return not leaves_root(reference) and (self.root / reference).is_file()
        except OSError as error:  # a name that no file can have, or a folder that may not be read
            raise DataError(f"image {shown(reference)} can't be looked up: {error.strerror}") from None

    def missing(self, references: Sequence[str]) -> set[str]:
        """Return which of the references, each given once, are not there; see :mod:`prunetune.data_recipes.presence`.

        Raises:
            DataError: as :meth:`exists` does.
        """
        return missing_files(self.root, references, self.exists)

    def size(self, reference: str, sample_id: str) -> tuple[int, int]:
        """Return width and height, of which the file's head knows."""
        check_inside(reference, f"sample {sample_id!r}")
        return self.size_in(self.root / reference, f"sample {sample_id!r}: image {self.root / reference}")

    def open(self, reference: str, sample_id: str) -> Image.Image:
        """Return the decoded RGB image."""
        check_inside(reference, f"sample {sample_id!r}")
        path = self.root / reference
        try:
            return self.decode(path, f"sample {sample_id!r}: image {path}")
        except FileNotFoundError:
            raise DataError(f"sample {sample_id!r}: image {path} is missing") from None


def leaves_root(reference: str) -> bool:
    """Return whether an image path is absolute or climbs, so that it could name any file of the machine."""
    path = PurePath(reference)
    return path.is_absolute() or ".." in path.parts


def check_inside(reference: str, where: str) -> None:
    """Raise DataError, its message beginning with ``where``, for an image path that leaves its folder."""
    if leaves_root(reference):
        raise DataError(
            f"{where}: image path {shown(reference)} leaves the image folder; paths are relative to data.image_root, "
            "without '..' (a link in that folder may lead elsewhere)"
        )


def pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Return the image centred on a square of ``color``, as LLaVA-1.5 prepares its images."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), color)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    square.paste(image, (left, top))
    return square
