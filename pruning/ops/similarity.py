"""How alike tokens are: cosine similarity, cosine distance, L2 distance of all pairs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

ALIKE = 1e-6
"""Cosine distances up to this are rounding: a few float32 steps at 1."""
STRIPS = 6
"""Strips of rows that a product with itself is cut into; of 2 to 12 it was the fastest."""
WORTH_CUTTING = 192
"""Fewer tokens are one product: strips of a few rows cost more than the half that they save."""


def gram(features: Float[Tensor, "B N C"]) -> Float[Tensor, "B N N"]:
    """Return the inner products of all pairs (B, N, N), on a CPU half of them as the mirror image of the others."""
    columns = features.transpose(1, 2)  # (B, C, N)
    batch, count, _ = features.shape
    if features.is_cuda or count < WORTH_CUTTING:  # a GPU takes one launch instead
        return features @ columns
    # Strips from the diagonal to the right, 7 / 12 of the multiplications. On one CPU thread 18.4 ms instead of 26.8
    # for 576 x 4096, 144 instead of 213 for 8 such items, 432 instead of 696 for 2880 x 4096.
    product = features.new_empty(batch, count, count)
    step = math.ceil(count / STRIPS)
    for start in range(0, count, step):
        end = min(start + step, count)
        strip = features[:, start:end] @ columns[:, :, start:]  # (B, step, count - start)
        product[:, start:end, start:] = strip
        product[:, end:, start:end] = strip[:, :, end - start :].transpose(1, 2)
    return product


def cosine_similarity(
    features: Float[Tensor, "B N C"],
    others: Float[Tensor, "B M C"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "B N L"]:
    """Return all pairwise cosine similarities (B, N, M); a zero vector is similar to nothing.

    Args:
        features: (B, N, C).
        others: (B, M, C); None compares the features with themselves.
        dtype: of the arithmetic. Where the order of all similarities decides, float32 is not enough: its rounding
            depends on the sizes of a matrix product and on its threads.
    """
    features = features.to(dtype)
    if others is None and features.shape[1] < features.shape[2]:
        # Scaling the N x N product moves less memory than scaling the N x C features: on one CPU thread 212 ms instead
        # of 249 for 8 items of 576 x 4096.
        product = gram(features)
        norm = product.diagonal(dim1=1, dim2=2).sqrt()
        inverse = torch.where(norm > 0, 1 / norm, 0)
        product.mul_(inverse[:, :, None])
        return product.mul_(inverse[:, None, :])
    unit = F.normalize(features, dim=-1)
    if others is None:
        return gram(unit)
    other_unit = F.normalize(others.to(dtype), dim=-1)
    return unit @ other_unit.transpose(-1, -2)


def cosine_distance(features: Float[Tensor, "B N C"]) -> Float[Tensor, "B N N"]:
    """Return 1 - cosine for all pairs (B, N, N) in float32; up to ``ALIKE`` it is 0, the tokens are duplicates."""
    # In place: the matrix of 8 items of 2880 tokens takes 265 MB.
    distance = cosine_similarity(features).neg_().add_(1)
    # Duplicates must tie, so that the lower index wins; rounding would put them in an order of its own.
    return F.threshold(distance, ALIKE, 0.0, inplace=True)


def euclidean_distance(
    features: Float[Tensor, "B N C"],
) -> tuple[Float[Tensor, "B N N"], Float[Tensor, "B N"]]:
    """Return L2 distances of all pairs (B, N, N) and of all to their mean (B, N), float32, by one matrix product."""
    features = features.float()
    # |a - b|^2 = |a|^2 - 2 a.b + |b|^2 needs the product alone: 28 ms for 576 x 4096 on one CPU thread, where
    # differences of all pairs (torch.cdist without products) take 1,140 ms.
    product = gram(features)
    square = product.diagonal(dim1=1, dim2=2).clone()  # (B, N)
    # The mean token is never made: its products with the others are means of rows, its own the mean of all.
    with_mean = product.mean(dim=-1)  # (B, N)
    of_mean = product.mean(dim=(1, 2))[:, None]  # (B, 1)
    to_mean = square - 2 * with_mean + of_mean
    distance = product.mul_(-2)
    distance.add_(square[:, :, None]).add_(square[:, None, :])
    # A token's own distance is a difference of equal sums and may come out as rounding.
    distance.diagonal(dim1=1, dim2=2).zero_()
    return distance.clamp_(min=0).sqrt_(), to_mean.clamp(min=0).sqrt()
