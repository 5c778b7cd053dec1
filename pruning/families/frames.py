"""Images and frames of any size as items: those of one size together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunetune.pruning.signals import of_source, signal_of
from prunetune.pruning.types import VisualTokens
from prunetune.pruning.vision import Vision


def of_frames(
    modality: str,
    sizes: Sequence[tuple[int, int, int]],
    features: Tensor,
    projected: Sequence[Tensor],
    signals: Mapping[str, Tensor],
    pixels: Tensor,
    needs: frozenset[str],
) -> Vision:
    """Return images of T tokens in all whose every token fills a slot; each frame is an item.

    Args:
        modality: "image" or "video".
        sizes: for each image its frames, and the rows and columns of tokens of a frame.
        features: (T, C) in the order of images, frames, rows and columns.
        projected: for each image (L, D).
        signals: flat in the same order, (T, C), (T,) or (H, T).
        pixels: (T, values) those of each token.
        needs: what the pruner asked for, of which this reads what comes from pixels.
    """
    frames: dict[tuple[int, int], list[tuple[int, int]]] = {}  # by size: image and first token
    first = 0
    for image, (number, rows, columns) in enumerate(sizes):
        for _ in range(number):
            frames.setdefault((rows, columns), []).append((image, first))
            first += rows * columns

    in_llm_space = torch.cat(list(projected))
    groups, owners = [], []
    number_of = torch.empty(len(features), dtype=torch.long, device=features.device)
    numbered = 0
    for (rows, columns), members in frames.items():
        starts = torch.tensor([start for _, start in members], device=features.device)
        places = starts[:, None] + torch.arange(rows * columns, device=features.device)  # (B, N)
        count = places.numel()
        number_of[places.flatten()] = torch.arange(numbered, numbered + count, device=features.device)
        numbered += count
        own = {name: _gathered(values, places, signal_of(name).axes) for name, values in signals.items()}
        for need in of_source(needs, "pixels"):
            read = signal_of(need).read
            assert read is not None  # only text has none
            own[signal_of(need).name] = read(pixels[places])
        groups.append(VisualTokens(features[places], in_llm_space[places], signals=own, grid=(rows, columns)))
        owners.append(tuple(image for image, _ in members))
    lengths = [number * rows * columns for number, rows, columns in sizes]
    return Vision(
        modality=modality,
        groups=tuple(groups),
        owner=tuple(owners),
        slots=tuple(projected),
        origin=number_of.split(lengths),
    )


def _gathered(values: Tensor, places: Tensor, axes: str) -> Tensor:
    """Return flat values at ``places`` (B, N)."""
    return values[:, places].transpose(0, 1) if axes == "B H N" else values[places]
