"""Positions of tokens: the best K, in raster order, as a mask, and the rows at them."""

from __future__ import annotations

import torch
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


def mask_of(indices: Tensor, count: int) -> Tensor:
    """Return the positions (B, K) as a boolean mask (B, N)."""
    return torch.zeros(len(indices), count, dtype=torch.bool, device=indices.device).scatter(1, indices, True)


def rows_of(values: Tensor, indices: Tensor) -> Tensor:
    """Return ``values`` (B, N, C) at positions (B, K): (B, K, C)."""
    first = torch.arange(len(values), device=values.device)[:, None] * values.shape[1]
    rows = values.flatten(0, 1).index_select(0, (indices + first).flatten())  # whole rows at a time
    return rows.view(*indices.shape, values.shape[-1])
