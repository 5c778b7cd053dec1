"""Means, ranges and outliers, over the tokens of an item or of all items of an image."""

from __future__ import annotations

import torch
from torch import Tensor


def text_mask(embeds: Tensor) -> Tensor:
    """Return which rows (B, M) of text embeddings (B, M, E) are text: padding is rows of zeros."""
    return (embeds != 0).any(dim=-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``values`` (B, N, M) over the M that ``mask`` (B, M) allows; 0 where it allows none."""
    weight = mask.to(values)
    return (values * weight[:, None, :]).sum(dim=-1) / weight.sum(dim=-1, keepdim=True).clamp(min=1)


def image_range(values: Tensor, image: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return minimum and maximum (B, 1) of ``values`` (B, N) over all items of the same image."""
    low, high = values.amin(dim=1), values.amax(dim=1)
    if image is not None and len(image):
        size = len(image)  # image numbers are below the number of items
        low = low.new_full((size,), float("inf")).scatter_reduce(0, image, low, "amin")[image]
        high = high.new_full((size,), float("-inf")).scatter_reduce(0, image, high, "amax")[image]
    return low[:, None], high[:, None]


def outlier_share(values: Tensor, image: Tensor | None) -> Tensor:
    """Return the share (B,) of an image's values above Q3 + 1.5 (Q3 - Q1), float64: PruMerge's adaptive ratio.

    Args:
        values: (B, N) scores.
        image: (B,) image of each item, below B; quartiles and counts are taken over all items of an image.
    """
    batch, count = values.shape
    image = torch.arange(batch, device=values.device) if image is None else image
    flat, owner = values.double().flatten(), image.repeat_interleave(count)
    by_value = flat.argsort(stable=True)
    order = by_value[owner[by_value].argsort(stable=True)]  # by image, then by value
    ranked = flat[order]
    total = torch.zeros(batch, dtype=torch.long, device=values.device).scatter_add(0, owner, torch.ones_like(owner))
    start = total.cumsum(0) - total
    last = (total - 1).clamp(min=0)

    def quartile(share: float) -> Tensor:
        place = share * last
        below = place.floor().long()
        low, high = (ranked[(start + p).clamp(max=len(ranked) - 1)] for p in (below, torch.minimum(below + 1, last)))
        return low + (high - low) * (place - below)

    first, third = quartile(0.25), quartile(0.75)
    above = flat > (third + 1.5 * (third - first))[owner]
    outliers = torch.zeros_like(total).scatter_add(0, owner, above.long())
    return (outliers.double() / total.clamp(min=1))[image]
