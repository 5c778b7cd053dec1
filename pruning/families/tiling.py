"""How a picture was cut into items: rows and columns of tiles, and which item shows the whole of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """The items of one picture, in their order.

    Attributes:
        rows: of tiles.
        columns: of tiles; tiles come row by row.
        whole: the number of the item that shows the whole picture, before or behind all tiles; None if none does.
    """

    rows: int
    columns: int
    whole: int | None = None

    @property
    def count(self) -> int:
        """How many items there are."""
        return self.rows * self.columns + (self.whole is not None)

    def tiles(self) -> list[int]:
        """Return the numbers of the tiles, row by row: of 1 x 2 tiles behind a view of the whole ``[1, 2]``."""
        return [number for number in range(self.count) if number != self.whole]


WHOLE = Tiling(1, 1)
"""A picture that is one item."""


def anyres_tiling(size: tuple[int, int], grids: Sequence[Sequence[int]], side: int) -> Tiling:
    """Return how LLaVA-1.6 and its like cut a picture of this height and width: the whole of it first, then tiles."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    rows, columns = get_anyres_image_grid_shape(size, [list(grid) for grid in grids], side)
    return Tiling(rows, columns, whole=0)


def canvas_tiling(size: tuple[int, int], image_processor: Any) -> Tiling:
    """Return how InternVL cuts a picture of this height and width: tiles, and behind several the whole of it."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    tile = image_processor.size
    target = (int(tile["height"]), int(tile["width"]))
    columns, rows = get_optimal_tiled_canvas(size, target, image_processor.min_patches, image_processor.max_patches)
    return Tiling(rows, columns, whole=rows * columns if rows * columns > 1 else None)


def written_tilings(ids: Tensor, placeholder: int, tokenizer: Any) -> list[Tiling]:
    """Return how Idefics3 cut each picture of a prompt (L,): it writes ``<row_1_col_2>`` before a tile's placeholders.

    A run of placeholders without such a word before it shows a whole picture, behind its tiles if it has any.
    """
    words = tokenizer.convert_ids_to_tokens(ids.tolist())
    numbers = ids.tolist()
    found: list[Tiling] = []
    corner, named = (0, 0), -1
    for at, (word, number) in enumerate(zip(words, numbers, strict=True)):
        place = re.fullmatch(r"<row_(\d+)_col_(\d+)>", word or "")
        if place is not None:
            corner = (int(place[1]), int(place[2]))
            named = at
        if number != placeholder or (at and numbers[at - 1] == placeholder):
            continue
        if corner != (0, 0) and named == at - 1:
            continue  # a tile: its last one says how many there are
        rows, columns = corner
        found.append(Tiling(rows, columns, whole=rows * columns) if rows else WHOLE)
        corner = (0, 0)
    return found
