"""Attention recomputed for single rows or columns, from queries and keys."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

QUERIES_AT_ONCE = 128
"""Queries whose attention is held at a time: the map of 16 heads and 10,000 patches would take 6.4 GB in float32."""


def cls_attention(
    query: Float[Tensor, "B H 1 d"],
    key: Float[Tensor, "B H T d"],
    scale: float,
) -> Float[Tensor, "B H N"]:
    """Return the softmaxed attention of [CLS] to the patches, (B, H, N) float32.

    Args:
        query: (B, H, 1, d) of [CLS].
        key: (B, H, 1 + N, d), [CLS] first.
        scale: factor of the logits.
    """
    # One row per head costs little, and rounding once from float64 leaves no bit to the order of a sum.
    product = query.double() @ key.double().transpose(-1, -2)  # (B, H, 1, 1 + N)
    logits = product * scale
    attention = logits.softmax(dim=-1)[:, :, 0]
    return attention[..., 1:].float()


def received_attention(
    query: Float[Tensor, "B H T d"],
    key: Float[Tensor, "B H T d"],
    scale: float,
    skip: int,
    visible: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B H N"]:
    """Return the attention that each patch receives, mean over all queries, (B, H, N) float32.

    Queries go through in chunks, so that no full attention map is held. Padding is no query, and receives nothing.

    Args:
        query: (B, H, skip + N, d).
        key: (B, H, skip + N, d).
        scale: factor of the logits.
        skip: leading tokens that are no patches; they are queries too, but their columns are dropped.
        visible: (B, skip + N), false for padding; None where there is none.
    """
    received = torch.zeros(key.shape[:-1], device=key.device)  # (B, H, skip + N)
    columns = key.float().transpose(-1, -2)
    if visible is None:
        for rows in query.float().split(QUERIES_AT_ONCE, dim=2):
            logits = (rows @ columns) * scale  # (B, H, chunk, skip + N)
            attention = logits.softmax(dim=-1)
            received += attention.sum(dim=2)
        return received[..., skip:] / query.shape[2]
    is_padding = ~visible[:, None, None]  # (B, 1, 1, skip + N)
    for rows, counts in zip(
        query.float().split(QUERIES_AT_ONCE, dim=2), visible.split(QUERIES_AT_ONCE, dim=1), strict=True
    ):
        logits = ((rows @ columns) * scale).masked_fill(is_padding, float("-inf"))
        attention = logits.softmax(dim=-1) * counts[:, None, :, None]
        received += attention.sum(dim=2)
    queries = visible.sum(dim=1)[:, None, None]
    return received[..., skip:] / queries
