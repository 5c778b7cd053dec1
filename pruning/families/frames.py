"""Images and frames of any size as items: those of one size together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from prunetune.pruning.signals import of_source, signal_of
from prunetune.pruning.types import VisualTokens
from prunetune.pruning.vision import Vision


def of_frames(
    modality: str,
    sizes: Sequence[tuple[int, int, int]],
    features: Float[Tensor, "T C"],
    projected: Sequence[Float[Tensor, "L D"]],
    signals: Mapping[str, Tensor],
    pixels: Float[Tensor, "T values"],
    needs: frozenset[str],
) -> Vision:
    """Return images of T tokens in all whose every token fills a slot; each frame is an item.

    The sizes ``[(2, 1, 2), (1, 1, 3)]``, a clip of two frames and an image of another size, are two groups: of the
    tokens 0 to 3 as two items, and of the tokens 4 to 6 as one.

    Args:
        modality: "image" or "video".
        sizes: for each image its frames, and the rows and columns of tokens of a frame.
        features: (T, C) in the order of images, frames, rows and columns.
        projected: for each image (L, D).
        signals: flat in the same order, (T, C), (T,) or (H, T).
        pixels: (T, values) those of each token.
        needs: what the pruner asked for, of which this reads what comes from pixels.
    """
    device = features.device
    in_llm_space = torch.cat(list(projected))  # (T, D)
    groups, owners = [], []
    # Groups count their tokens through, and slots are in the order of images: this says which token is in which slot.
    number_of = torch.empty(len(features), dtype=torch.long, device=device)  # (T,)
    numbered = 0
    for (rows, columns), frames in _by_size(sizes).items():
        starts = torch.tensor([frame.start for frame in frames], device=device)
        indices = starts[:, None] + torch.arange(rows * columns, device=device)  # (B, N)
        count = indices.numel()
        number_of[indices.flatten()] = torch.arange(numbered, numbered + count, device=device)
        numbered += count
        own = {}
        for name, values in signals.items():
            own[name] = _gathered(values, indices, signal_of(name).axes)
        for need in of_source(needs, "pixels"):
            read = signal_of(need).read
            assert read is not None  # only text has none
            own[signal_of(need).name] = read(pixels[indices])
        groups.append(VisualTokens(features[indices], in_llm_space[indices], signals=own, grid=(rows, columns)))
        owners.append(tuple(frame.image for frame in frames))
    lengths = [number * rows * columns for number, rows, columns in sizes]
    return Vision(
        modality=modality,
        groups=tuple(groups),
        owner=tuple(owners),
        slots=tuple(projected),
        origin=number_of.split(lengths),
    )


@dataclass(frozen=True)
class _Frame:
    """One frame: its image or clip, and its first token."""

    image: int
    start: int


def _by_size(sizes: Sequence[tuple[int, int, int]]) -> dict[tuple[int, int], list[_Frame]]:
    """Return the frames by their rows and columns, sizes in order of their first frame."""
    frames: dict[tuple[int, int], list[_Frame]] = {}
    start = 0
    for image, (number, rows, columns) in enumerate(sizes):
        for _ in range(number):
            frames.setdefault((rows, columns), []).append(_Frame(image, start))
            start += rows * columns
    return frames


def _gathered(
    values: Tensor,
    indices: Int[Tensor, "B N"],
    axes: str,
) -> Shaped[Tensor, "B ..."]:
    """Return flat values, (T, C), (T,) or (H, T), at ``indices`` (B, N)."""
    if axes == "B H N":
        return values[:, indices].transpose(0, 1)
    return values[indices]
