"""Videos as clips of frames of one size: each frame is an item."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunetune.pruning.errors import PruningError
from prunetune.pruning.families.anyres import owner_of
from prunetune.pruning.types import VisualTokens
from prunetune.pruning.vision import NEWLINE, Vision


def check_clips(pixels: Tensor) -> None:
    """Check that pixels are those of videos, (videos, F, 3, H, W).

    Raises:
        PruningError: for another shape.
    """
    if pixels.ndim != 5:
        raise PruningError(
            f"`pixel_values_videos` must be (videos, frames, 3, height, width), got {tuple(pixels.shape)}; videos of "
            "one batch have equally many frames"
        )


def of_clips(
    tokens: VisualTokens,
    slots: Float[Tensor, "videos L D"],
    origin: Int[Tensor, "videos L"],
    row: Int[Tensor, "videos L"] | None = None,
    modality: str = "video",
) -> Vision:
    """Return videos whose frames are items.

    Args:
        tokens: (B, N) the frames of all videos, in order.
        slots: the features of the placeholders.
        origin: the number of the token behind each slot, or ``NEWLINE``.
        row: the row that each slot lies in or ends, for families with slots that no token fills.
        modality: "video", or "image" for images that are one frame each.
    """
    videos = len(slots)
    frames = len(tokens.features) // videos
    return Vision(
        modality=modality,
        groups=(tokens,),
        owner=(owner_of([frames] * videos),),
        slots=tuple(slots),
        origin=tuple(origin),
        row=() if row is None else tuple(row),
    )


def numbers_of(tokens: VisualTokens, videos: int) -> Int[Tensor, "videos F N"]:
    """Return the numbers of all tokens by video and frame."""
    frames, count = tokens.features.shape[:2]
    numbers = torch.arange(frames * count, device=tokens.features.device)
    return numbers.view(videos, -1, count)


def with_cls_first(numbers: Int[Tensor, "videos F N"]) -> tuple[Int[Tensor, "videos L"], Int[Tensor, "videos L"]]:
    """Return origin and row of slots where each frame begins with [CLS]: it stays as a row end of its frame would.

    Of one video with two frames of two tokens the origin is ``[-1, 0, 1, -1, 2, 3]``, the row ``[0, 0, 0, 1, 1, 1]``.
    """
    videos, frames, count = numbers.shape
    origin = torch.cat([numbers.new_full((videos, frames, 1), NEWLINE), numbers], dim=2)
    row = torch.arange(frames, device=numbers.device).repeat_interleave(count + 1)
    return origin.flatten(1), row.expand(videos, -1)


def with_end(numbers: Int[Tensor, "videos F N"]) -> tuple[Int[Tensor, "videos L"], Int[Tensor, "videos L"]]:
    """Return origin and row of slots where each video ends with a newline: it stays as long as a token stays."""
    origin = numbers.flatten(1)
    end = origin.new_full((len(origin), 1), NEWLINE)
    origin = torch.cat([origin, end], dim=1)
    return origin, torch.zeros_like(origin)
