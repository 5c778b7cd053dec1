"""Choosing tokens: batched, float32, always K distinct ones, ties to the lower index."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pruning.types import VisualTokens

ALIKE = 1e-6
"""Cosine distances up to this are rounding: a few float32 steps at 1."""


def top_k(scores: Tensor, keep: int) -> Tensor:
    """Return the positions of the ``keep`` highest scores (B, K), best first; of equals the lower index first.

    Args:
        scores: (B, N) float32.
        keep: K, at most N.
    """
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :keep]


def ascending(indices: Tensor) -> Tensor:
    """Return positions (B, K) in raster order."""
    return torch.sort(indices, dim=-1).values


def mask_of(indices: Tensor, count: int) -> Tensor:
    """Return the positions (B, K) as a boolean mask (B, N)."""
    return torch.zeros(len(indices), count, dtype=torch.bool, device=indices.device).scatter(1, indices, True)


def rows_of(values: Tensor, indices: Tensor) -> Tensor:
    """Return ``values`` (B, N, C) at positions (B, K): (B, K, C)."""
    first = torch.arange(len(values), device=values.device)[:, None] * values.shape[1]
    rows = values.flatten(0, 1).index_select(0, (indices + first).flatten())  # whole rows at a time
    return rows.view(*indices.shape, values.shape[-1])


def cosine_similarity(features: Tensor, others: Tensor | None = None) -> Tensor:
    """Return all pairwise cosine similarities (B, N, M) in float32; a zero vector is similar to nothing."""
    features = features.float()
    if others is None and features.shape[1] < features.shape[2]:  # scaling the product moves less memory
        product = features @ features.transpose(-1, -2)
        norm = product.diagonal(dim1=1, dim2=2).sqrt()
        inverse = torch.where(norm > 0, 1 / norm, 0)
        return product.mul_(inverse[:, :, None]).mul_(inverse[:, None, :])
    unit = F.normalize(features, dim=-1)
    other = unit if others is None else F.normalize(others.float(), dim=-1)
    return unit @ other.transpose(-1, -2)


def cosine_distance(features: Tensor) -> Tensor:
    """Return 1 - cosine for all pairs (B, N, N) in float32; up to ``ALIKE`` it is 0, the tokens are duplicates."""
    distance = cosine_similarity(features).neg_().add_(1)
    return F.threshold(distance, ALIKE, 0.0, inplace=True)


def euclidean_distance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return L2 distances of all pairs (B, N, N) and of all to their mean (B, N), float32, by one matrix product."""
    features = features.float()
    product = features @ features.transpose(-1, -2)
    square = product.diagonal(dim1=1, dim2=2).clone()
    to_mean = square - 2 * product.mean(dim=-1) + product.mean(dim=(1, 2))[:, None]
    distance = product.mul_(-2).add_(square[:, :, None]).add_(square[:, None, :])
    distance.diagonal(dim1=1, dim2=2).zero_()
    return distance.clamp_(min=0).sqrt_(), to_mean.clamp(min=0).sqrt()


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


def instruction_relevance(tokens: VisualTokens, text: str = "clip") -> Tensor:
    """Return the cosine (B, N) of every visual token with the instruction, float32.

    Args:
        tokens: ``image_embeds`` and ``text_embeds`` for "clip" (mean over the instruction's pieces); ``projected``
            and ``text_token_embeds`` for "llm" (with the mean token embedding).
        text: "clip" or "llm".
    """
    if text == "clip":
        pieces = tokens.finite("text_embeds")
        return masked_mean(cosine_similarity(tokens.finite("image_embeds"), pieces), text_mask(pieces))
    words = tokens.finite("text_token_embeds")
    mean = masked_mean(words.transpose(1, 2), text_mask(words))[:, None]  # (B, 1, D)
    return cosine_similarity(tokens.finite("projected"), mean)[..., 0]
