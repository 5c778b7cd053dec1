"""Images as a base view and crops, which the model merges into one grid whose rows end with a newline token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from prunetune.pruning.errors import PruningError
from prunetune.pruning.vision import NEWLINE

Pack = Callable[[Sequence[Tensor], Tensor], list[Tensor]]
"""The model's own packing: from crops (k, N, c) of each image and a newline (c,) to (L, c) of each image."""


def crops_of(model: nn.Module, sizes: Int[Tensor, "images 2"]) -> list[int]:
    """Return how many crops the model makes of images of these heights and widths, base view included."""
    config: Any = model.config
    grids = tuple(map(tuple, config.image_grid_pinpoints))
    side = config.vision_config.image_size
    # Read back in one go, and not once per image.
    return [_crops_of_size(height, width, grids, side) for height, width in sizes.tolist()]


@lru_cache(maxsize=4096)
def _crops_of_size(height: int, width: int, grids: tuple[tuple[int, int], ...], side: int) -> int:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return image_size_to_num_patches((height, width), [list(grid) for grid in grids], side)


def check_crops(pixels: Tensor, crops: Sequence[int]) -> None:
    """Check that every image has its size, and the crops that its size asks for.

    Args:
        pixels: (images, crops, 3, H, W), padded; or (crops of all images, 3, H, W).
        crops: how many each image has by its size.

    Raises:
        PruningError: if they disagree.
    """
    if pixels.ndim == 5 and len(pixels) != len(crops):
        raise PruningError(
            f"the batch has pixels of {len(pixels)} images but `image_sizes` of {len(crops)}; pass both as the "
            "processor returned them"
        )
    there, asked = (pixels.shape[1], max(crops)) if pixels.ndim == 5 else (len(pixels), sum(crops))
    if pixels.ndim not in (4, 5) or there < asked or (pixels.ndim == 4 and there > asked):
        raise PruningError(
            f"`pixel_values` {tuple(pixels.shape)} do not hold the crops that `image_sizes` ask for, {list(crops)} of "
            "the images in order; the processor's image_grid_pinpoints are those of another model"
        )


def origin_of(
    pack: Pack,
    crops: Sequence[int],
    numbers: Int[Tensor, "crops N"],
) -> list[Int[Tensor, " L"]]:
    """Return for every packed token of each image (L,) the number of its crop token, or ``NEWLINE``.

    Numbers instead of features are sent through the model's own packing, so that no line of it is written again here;
    float64 holds them exactly.
    """
    values = numbers.double()[..., None]
    newline = values.new_full((1,), NEWLINE)
    return [image[:, 0].long() for image in pack(values.split(list(crops)), newline)]


def row_ends_of(
    pack: Pack,
    crops: Sequence[int],
    like: Float[Tensor, "crops N C"],
) -> list[Bool[Tensor, " L"]]:
    """Return for every packed token of each image (L,) whether it ends a row; also where rows are interpolated."""
    zeros = like.new_zeros(*like.shape[:2], 1)
    return [image[:, 0] > 0.5 for image in pack(zeros.split(list(crops)), zeros.new_ones(1))]


def rows_of(
    is_end: Bool[Tensor, " L"],
    count: int,
) -> Int[Tensor, " L"]:
    """Return the row of the merged grid (L,) that each slot lies in or ends; the base view before it has none.

    A base view of 2 tokens and a grid of 2 rows with 1 token each, ``[F, F, F, T, F, T]``, give
    ``[-1, -1, 0, 0, 1, 1]``.

    Args:
        is_end: (L,) which slots end a row.
        count: tokens per crop, and so of the base view.
    """
    ends, length = int(is_end.sum()), len(is_end)
    if ends == 1 and length == count + 1:  # a single view, and one newline after it
        return torch.zeros(length, dtype=torch.long, device=is_end.device)
    rows = torch.full((length,), -1, device=is_end.device)
    if ends:  # all rows are equally long, with their newline
        merged = length - count
        rows[count:] = torch.arange(merged, device=is_end.device) // (merged // ends)
    return rows


def owner_of(crops: Sequence[int]) -> tuple[int, ...]:
    """Return the image of each crop: ``[2, 1]`` gives ``(0, 0, 1)``."""
    owner: list[int] = []
    for image, number in enumerate(crops):
        owner += [image] * number
    return tuple(owner)


PackSizes = Callable[[Sequence[Tensor], Tensor, Tensor], list[Tensor]]
"""The same for any images: from crops of each image, their sizes (images, 2) and a newline."""


@dataclass(frozen=True)
class Packed:
    """Where the tokens of an image's crops are packed: the same for every image of its size, so it is made once.

    Attributes:
        origin: (L,) the token behind each slot, counted from the image's first, or ``NEWLINE``; on the CPU.
        row: (L,) the row of the merged grid, as of :func:`rows_of`.
    """

    origin: Int[Tensor, " L"]
    row: Int[Tensor, " L"]


_KEPT = 512  # sizes; of 2880 tokens they take 24 MB
_PACKED: WeakKeyDictionary[nn.Module, dict[tuple, Packed]] = WeakKeyDictionary()


def packed_images(
    model: nn.Module,
    pack: PackSizes,
    sizes: Int[Tensor, "images 2"],
    crops: Sequence[int],
    count: int,
    device: torch.device,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return for each image of a batch the token behind each slot, (L,), counted through the batch, and its row (L,).

    Only sizes that were not met before are sent through the model's packing; of the others nothing is computed on the
    device, and nothing is read back from it but the sizes.

    Args:
        model: the stock model, for which packings are kept.
        pack: its packing.
        sizes: (images, 2) height and width.
        crops: how many each image has.
        count: N, tokens per crop.
        device: where the result goes.
    """
    config: Any = model.config
    settings = (tuple(map(tuple, config.image_grid_pinpoints)), config.vision_config.image_size, count)
    known = _PACKED.setdefault(model, {})
    origins, rows, lengths = [], [], []
    first = 0
    for (height, width), number in zip(sizes.tolist(), crops, strict=True):
        key = (height, width, settings)
        if key not in known:
            known[key] = _packed(pack, (height, width), number, count)
        packed = known[key]
        while len(known) > _KEPT:
            del known[next(iter(known))]  # the oldest
        # On the CPU, where these are: a batch goes to the device in one piece.
        origins.append(torch.where(packed.origin == NEWLINE, NEWLINE, packed.origin + first))
        rows.append(packed.row)
        lengths.append(len(packed.origin))
        first += number * count
    return torch.cat(origins).to(device).split(lengths), torch.cat(rows).to(device).split(lengths)


def _packed(pack: PackSizes, size: tuple[int, int], crops: int, count: int) -> Packed:
    """Send the numbers of one image's tokens through the model's packing."""
    numbers = torch.arange(crops * count).view(crops, count)

    def pack_one(images: Sequence[Tensor], newline: Tensor) -> list[Tensor]:
        return pack(images, torch.tensor([size]), newline)

    (origin,) = origin_of(pack_one, [crops], numbers)
    return Packed(origin, rows_of(origin == NEWLINE, count))
