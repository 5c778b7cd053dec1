"""From an image URL of a request to a decoded image, within limits."""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from prunetune.configs.serving import LimitsConfig
from prunetune.data_recipes.images import StoredImages, TooLarge
from prunetune.data_recipes.sample import DataError
from prunetune.reading import one_line, shown
from prunetune.serving.errors import bad
from prunetune.serving.remote import fetch, split

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What is decoded. Pillow reads many more, some of which start other programs."""

NARROWEST = 200
"""How many times as long as wide an image may be. Processors scale the shorter side to that of their crop: an image of
1 x 1,000,000 pixels, a few hundred bytes as PNG, would be 336 x 336,000,000."""


class SentImages(StoredImages):
    """Decodes what clients send as evaluations decode their files, of fewer formats and within limits."""

    formats = FORMATS

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels

    def check_size(self, image: Image.Image, what: str) -> None:
        """Raise TooLarge for an image with too many pixels, or one that is a line."""
        super().check_size(image, what)
        if max(image.size) > NARROWEST * min(image.size):
            raise TooLarge(
                f"{what} has {image.width:,} x {image.height:,} pixels, and is at most {NARROWEST} times as long as "
                "wide; cut it"
            )


@dataclass(frozen=True)
class ImageReader:
    """Opens the images of requests.

    Attributes:
        limits: how large an image may be, and where it may come from.
    """

    limits: LimitsConfig

    def open(self, url: str, where: str) -> Image.Image:
        """Return the RGB image of a URL.

        Args:
            url: ``data:``, and where the options allow it ``http:``, ``https:`` or ``file:``.
            where: the field, for messages.

        Raises:
            Refused: 400 for what is no image, is too large, or lies where nothing may be read; 502 for one that could
                not be fetched.
        """
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            content = _data(url, where)
        elif scheme in ("http", "https"):
            content = fetch(url, self.limits.image_hosts, self.limits.max_body, where)
        elif scheme == "file":
            content = self._file(url, where)
        else:
            raise bad("invalid_image_url", f"{where}: an image URL begins with data:, got {shown(url)}", where)
        return self.decode(content, where)

    def decode(self, content: bytes, where: str) -> Image.Image:
        """Return the RGB image of a file's content, of which the head alone is read where it is too large."""
        try:
            return SentImages(self.limits.max_pixels).decode(io.BytesIO(content), f"{where}: the image")
        except TooLarge as error:
            raise bad("image_too_large", one_line(error), where) from error
        except DataError as error:
            why = one_line(error.__cause__ or error)
            raise bad(
                "invalid_image", f"{where}: the image can't be decoded ({why}); send {', '.join(FORMATS)}", where
            ) from error

    def _file(self, url: str, where: str) -> bytes:
        """Return a file's content, if it lies below the folder that may be read."""
        root = self.limits.image_root
        refused = bad("image_url_refused", f"{where}: file: URLs are not read here; send a data: URL", where)
        if root is None:
            raise refused
        parts = split(url, where)
        try:
            path = Path(unquote(parts.path)).resolve()  # links are followed before it is compared
        except (ValueError, RuntimeError):  # a NUL, or links in a circle
            raise refused from None
        if parts.netloc not in ("", "localhost") or not path.is_relative_to(Path(root).resolve()):
            raise refused
        try:
            if not path.is_file():  # of a pipe the end would be waited for
                raise bad("invalid_image", f"{where}: there is no such file", where)
            if path.stat().st_size > self.limits.max_body:
                raise bad("image_too_large", f"{where}: the file is above {self.limits.max_body:,} bytes", where)
            return path.read_bytes()
        except OSError:
            raise bad("invalid_image", f"{where}: there is no such file", where) from None


def _data(url: str, where: str) -> bytes:
    """Return what a data: URL holds; it must say that it is an image, in base64."""
    head, comma, text = url.partition(",")
    kind = head[len("data:") :].lower()
    if not comma or not kind.startswith("image/") or not kind.endswith(";base64"):
        raise bad(
            "invalid_image_url",
            f"{where}: a data: URL is data:image/png;base64,..., got {shown(head[:100])}",
            where,
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad("invalid_image", f"{where}: the data: URL is no base64 ({one_line(error)})", where) from None
