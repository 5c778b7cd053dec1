"""Choosing tokens: batched, float32, always K distinct ones, ties to the lower index."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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


def cosine_similarity(features: Tensor) -> Tensor:
    """Return all pairwise cosine similarities (B, N, N) in float32; a zero vector is similar to nothing."""
    unit = F.normalize(features.float(), dim=-1)
    return unit @ unit.transpose(-1, -2)


def farthest_points(distance: Tensor, nearest: Tensor, keep: int, blocked: Tensor | None = None) -> Tensor:
    """Pick ``keep`` tokens one by one, each the farthest from everything picked so far.

    Args:
        distance: (B, N, N) pairwise distances, float32.
        nearest: (B, N) each token's distance to what is already kept; the first pick is its maximum.
        keep: how many to pick.
        blocked: (B, N) boolean, tokens that must not be picked.

    Returns:
        (B, keep) positions in order of picking, all distinct; ties go to the lower index.
    """
    batch = torch.arange(len(distance), device=distance.device)
    nearest = nearest.clone()
    if blocked is not None:
        nearest = nearest.masked_fill(blocked, float("-inf"))
    picks = []
    for _ in range(keep):
        pick = nearest.argmax(dim=-1)
        picks.append(pick)
        nearest = torch.minimum(nearest, distance[batch, pick])
        nearest[batch, pick] = float("-inf")  # minimum() keeps -inf, so no token is picked twice
    return torch.stack(picks, dim=1) if picks else nearest.new_zeros((len(distance), 0), dtype=torch.long)
