"""Opening images."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from PIL import Image, UnidentifiedImageError

from prunetune.data_recipes.sample import DataError


class ImageOpener(Protocol):
    """Turns a sample's image reference into an image."""

    def exists(self, reference: str) -> bool:
        """Return whether the image is there, without decoding it."""
        ...

    def open(self, reference: str, sample_id: str) -> Image.Image:
        """Return the RGB image; raises DataError naming the sample if it can't."""
        ...


class FolderImages:
    """Images below a root folder.

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
        return (self.root / reference).is_file()

    def open(self, reference: str, sample_id: str) -> Image.Image:
        """Return the decoded RGB image."""
        path = self.root / reference
        try:
            with Image.open(path) as image:
                return image.convert("RGB")  # decodes: open() alone reads the head
        except FileNotFoundError:
            raise DataError(f"sample {sample_id!r}: image {path} is missing") from None
        # Pillow's decoders raise all of these for broken files.
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"sample {sample_id!r}: image {path} can't be decoded ({error}); replace the file"
            ) from error


def pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Return the image centred on a square of ``color``, as LLaVA-1.5 prepares its images."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), color)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    square.paste(image, (left, top))
    return square
