"""From an image URL of a request to a decoded image, within limits."""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from prunetune.configs.serving import LimitsConfig
from prunetune.reading import one_line, shown
from prunetune.serving.errors import Refused, bad
from prunetune.serving.remote import fetch

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What is decoded. Pillow reads many more, some of which start other programs."""


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
            # Pillow's own limit warns or fails by itself; ours, which is lower, is asked first.
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                self._check_size(image, where)
                return image.convert("RGB")
        except Refused:
            raise
        except Image.DecompressionBombError as error:
            raise bad("image_too_large", f"{where}: {one_line(error)}; make it smaller", where) from error
        # Pillow's decoders raise nearly anything for a broken file, struct.error and KeyError among it.
        except Exception as error:
            raise bad(
                "invalid_image",
                f"{where}: the image can't be decoded ({one_line(error)}); send {', '.join(FORMATS)}",
                where,
            ) from error

    def _check_size(self, image: Image.Image, where: str) -> None:
        pixels = image.width * image.height
        if pixels > self.limits.max_pixels:
            raise bad(
                "image_too_large",
                f"{where}: the image has {image.width:,} x {image.height:,} = {pixels:,} pixels, at most "
                f"{self.limits.max_pixels:,} are decoded; make it smaller",
                where,
            )

    def _file(self, url: str, where: str) -> bytes:
        """Return a file's content, if it lies below the folder that may be read."""
        root = self.limits.image_root
        refused = bad("image_url_refused", f"{where}: file: URLs are not read here; send a data: URL", where)
        if root is None:
            raise refused
        parts = urlsplit(url)
        path = Path(unquote(parts.path)).resolve()  # links are followed before it is compared
        if parts.netloc not in ("", "localhost") or not path.is_relative_to(Path(root).resolve()):
            raise refused
        try:
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
