"""Means, ranges and outliers, over the tokens of an item or of all items of an image."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def text_mask(embeds: Float[Tensor, "B M E"]) -> Bool[Tensor, "B M"]:
    """Return which rows (B, M) of text embeddings (B, M, E) are text: padding is rows of zeros."""
    return (embeds != 0).any(dim=-1)


def masked_mean(
    values: Float[Tensor, "B N M"],
    mask: Bool[Tensor, "B M"],
) -> Float[Tensor, "B N"]:
    """Return the mean of ``values`` (B, N, M) over the M that ``mask`` (B, M) allows; 0 where it allows none.

    Values ``[[[1.0, 3.0, 9.0]]]`` with the mask ``[[True, True, False]]`` give ``[[2.0]]``.
    """
    weight = mask.to(values)
    total = (values * weight[:, None, :]).sum(dim=-1)  # (B, N)
    return total / weight.sum(dim=-1, keepdim=True).clamp(min=1)


def image_range(
    values: Float[Tensor, "B N"],
    image: Int[Tensor, " B"] | None,
) -> tuple[Float[Tensor, "B 1"], Float[Tensor, "B 1"]]:
    """Return minimum and maximum (B, 1) of ``values`` (B, N) over all items of the same image."""
    low, high = values.amin(dim=1), values.amax(dim=1)
    if image is not None and len(image):
        # Image numbers are below the number of items, so B cells are enough, and no count is read from the device.
        size = (len(image),)
        lowest = low.new_full(size, float("inf"))
        highest = high.new_full(size, float("-inf"))
        low = lowest.scatter_reduce(0, image, low, "amin")[image]
        high = highest.scatter_reduce(0, image, high, "amax")[image]
    return low[:, None], high[:, None]


def outlier_share(
    values: Float[Tensor, "B N"],
    image: Int[Tensor, " B"] | None,
) -> Float[Tensor, " B"]:
    """Return the share (B,) of an image's values above Q3 + 1.5 (Q3 - Q1), float64: PruMerge's adaptive ratio.

    Args:
        values: (B, N) scores.
        image: (B,) image of each item, below B; quartiles and counts are taken over all items of an image.
    """
    batch, count = values.shape
    if image is None:
        image = torch.arange(batch, device=values.device)
    # float64, so that interpolating between two ranks rounds no value across the limit.
    flat = values.double().flatten()  # (B * N,)
    owner = image.repeat_interleave(count)  # (B * N,) the image of each value
    # Two stable sorts put the values in order of image, and within an image of value, so that an image of any number of
    # crops is one run of one vector.
    by_value = flat.argsort(stable=True)
    by_image = owner[by_value].argsort(stable=True)
    ranked = flat[by_value[by_image]]
    total = torch.zeros(batch, dtype=torch.long, device=values.device)  # (B,) values per image
    total = total.scatter_add(0, owner, torch.ones_like(owner))
    start = total.cumsum(0) - total
    first = _quantile(ranked, start, total, 0.25)
    third = _quantile(ranked, start, total, 0.75)
    above = flat > (third + 1.5 * (third - first))[owner]
    outliers = torch.zeros_like(total).scatter_add(0, owner, above.long())
    share = outliers.double() / total.clamp(min=1)  # of each image
    return share[image]


def _quantile(
    ranked: Float[Tensor, " V"],
    start: Int[Tensor, " B"],
    total: Int[Tensor, " B"],
    share: float,
) -> Float[Tensor, " B"]:
    """Return a quantile (B,) of each of the runs that ``ranked`` (V,) holds, interpolated between ranks."""
    last = (total - 1).clamp(min=0)
    rank = share * last
    below = rank.floor().long()
    above = torch.minimum(below + 1, last)
    # Image numbers without items have empty runs, whose start may lie behind the last value.
    end = len(ranked) - 1
    low = ranked[(start + below).clamp(max=end)]
    high = ranked[(start + above).clamp(max=end)]
    return low + (high - low) * (rank - below)
