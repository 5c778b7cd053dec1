"""How alike tokens are: cosine similarity, cosine distance, L2 distance of all pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

ALIKE = 1e-6
"""Cosine distances up to this are rounding: a few float32 steps at 1."""


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
        # Half of it would do, mirrored, in 0.68 of the time. But the bits of products of strips depend on the batch and
        # the number of threads (in float64 with 3 threads at nearly every size tried), and those of this one never did.
        product = features @ features.transpose(-1, -2)
        norm = product.diagonal(dim1=1, dim2=2).sqrt()
        inverse = torch.where(norm > 0, 1 / norm, 0)
        product.mul_(inverse[:, :, None])
        return product.mul_(inverse[:, None, :])
    unit = F.normalize(features, dim=-1)
    if others is None:
        return unit @ unit.transpose(-1, -2)
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
    product = features @ features.transpose(-1, -2)
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
