"""Shapes as SVG: vector boxes over pictures that are within the file."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Sequence
from html import escape as escaped

import numpy as np
from PIL import Image

from prunetune.evaluation.report.tables.layouts.examples import Picture as Encoded
from prunetune.evaluation.visual.drawing.shapes import (
    INKS,
    LOOKS,
    Box,
    Color,
    Group,
    Picture,
    Shape,
    Stroke,
    Words,
)

_NO_TEXT = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML has no place for, such as control characters, which a model may answer with."""


def escape(text: str) -> str:
    """Return text as it stands in an SVG file."""
    return escaped(_NO_TEXT.sub("\ufffd", text))


def to_svg(shapes: Sequence[Shape], width: float, height: float, about: str) -> str:
    """Return shapes as the text of an SVG file, a rectangle for every box."""
    seen: dict[str, Picture] = {}
    for picture in pictures_in(shapes):
        seen.setdefault(picture.key, picture)
    defined = "".join(image_of(picture, f"picture-{key}") for key, picture in seen.items())
    body = "".join(_drawn(shape) for shape in shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(width)} {_n(height)}" width="{_n(width)}" '
        f'height="{_n(height)}" role="img" font-family="DejaVu Sans, Verdana, sans-serif">\n'
        f"<title>{escape(about)}</title>\n<style>{style()}</style>\n<defs>{defined}</defs>\n{body}</svg>\n"
    )


def pictures_in(shapes: Sequence[Shape]) -> Iterator[Picture]:
    """Give all pictures, those of groups as well."""
    for shape in shapes:
        if isinstance(shape, Picture):
            yield shape
        elif isinstance(shape, Group):
            yield from pictures_in(shape.shapes)


def image_of(picture: Picture, name: str) -> str:
    """Return a picture as an element with a name, at the origin: uses of it move it."""
    own = "" if picture.smooth else ' image-rendering="pixelated"'
    return (
        f'<image id="{name}" width="{_n(picture.width)}" height="{_n(picture.height)}" preserveAspectRatio="none"'
        f'{own} href="{encoded(picture)}"/>\n'
    )


def encoded(picture: Picture) -> str:
    """Return a picture's pixels as a data address; a map's cells to the last bit."""
    if picture.smooth:
        found = Encoded.of(picture.pixels)
        return f"data:{found.media};base64,{found.data}"
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture.pixels)).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def style() -> str:
    """Return the looks of all kinds as a style sheet."""
    rules = []
    for kind, look in LOOKS.items():
        fill = "none" if look.fill is None else _rgb(look.fill)
        rule = f".{kind}{{fill:{fill}"
        if look.fill is not None and look.fill[3] < 1:
            rule += f";fill-opacity:{look.fill[3]:g}"
        if look.stroke is None:
            rule += ";shape-rendering:crispEdges"  # or a seam would show between two veils
        else:
            rule += f";stroke:{_rgb(look.stroke)};stroke-width:{look.width:g}"
            if look.stroke[3] < 1:
                rule += f";stroke-opacity:{look.stroke[3]:g}"
        rules.append(rule + "}")
    rules += [f".{ink}{{fill:{_rgb((*color, 1.0))}}}" for ink, color in INKS.items()]
    return "".join(rules)


def compact(shapes: Sequence[Shape], use: str) -> str:
    """Return shapes as the inside of an SVG with one path for all boxes of a kind that follow one another.

    Args:
        shapes: pictures, boxes and strokes.
        use: what the names of pictures begin with, which are defined elsewhere on the page.
    """
    parts: list[str] = []
    kind, path = "", ""
    for shape in [*shapes, None]:
        own = shape.kind if isinstance(shape, (Box, Stroke)) else ""
        if own != kind and path:
            parts.append(f'<path class="{kind}" d="{path}"/>')
            path = ""
        kind = own
        if isinstance(shape, Box):
            path += f"M{_n(shape.left)} {_n(shape.top)}h{_n(shape.width)}v{_n(shape.height)}h{_n(-shape.width)}z"
        elif isinstance(shape, Stroke):
            path += f"M{_n(shape.x1)} {_n(shape.y1)}L{_n(shape.x2)} {_n(shape.y2)}"
        elif isinstance(shape, Picture):
            parts.append(f'<use href="#{use}{shape.key}" x="{_n(shape.left)}" y="{_n(shape.top)}"/>')
        elif isinstance(shape, Words):
            parts.append(_words(shape))
    return "".join(parts)


def _drawn(shape: Shape) -> str:
    if isinstance(shape, Group):
        data = "".join(f' data-{name}="{escape(value)}"' for name, value in shape.data.items())
        inner = "".join(_drawn(own) for own in shape.shapes)
        return f"<g{data}><title>{escape(shape.about)}</title>\n{inner}</g>\n"
    if isinstance(shape, Picture):
        return f'<use href="#picture-{shape.key}" x="{_n(shape.left)}" y="{_n(shape.top)}"/>\n'
    if isinstance(shape, Box):
        token = "" if shape.token is None else f' data-token="{shape.token}"'
        into = "" if shape.into is None else f' data-into="{shape.into}"'
        return (
            f'<rect class="{shape.kind}"{token}{into} x="{_n(shape.left)}" y="{_n(shape.top)}" '
            f'width="{_n(shape.width)}" height="{_n(shape.height)}"/>\n'
        )
    if isinstance(shape, Stroke):
        ends = f'x1="{_n(shape.x1)}" y1="{_n(shape.y1)}" x2="{_n(shape.x2)}" y2="{_n(shape.y2)}"'
        return f'<line class="{shape.kind}" {ends}/>\n'
    return _words(shape)


def _words(shape: Words) -> str:
    weight = ' font-weight="bold"' if shape.bold else ""
    at = f'x="{_n(shape.left)}" y="{_n(shape.top)}" font-size="{_n(shape.size)}"'
    return f'<text class="{shape.ink}" {at}{weight}>{escape(shape.text)}</text>\n'


def _n(value: float) -> str:
    """Return a number with as many digits as can be seen."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"


def _rgb(color: Color) -> str:
    return f"#{color[0]:02x}{color[1]:02x}{color[2]:02x}"
