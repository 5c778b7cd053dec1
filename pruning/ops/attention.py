"""Attention recomputed for single rows or columns, from queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES_AT_ONCE = 128
"""Queries whose attention is held at a time: the whole map of a long item would take gigabytes."""


def cls_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return the softmaxed attention of [CLS] to the patches, (B, H, N) float32.

    Args:
        query: (B, H, 1, d) of [CLS].
        key: (B, H, 1 + N, d), [CLS] first.
        scale: factor of the logits.
    """
    logits = (query.double() @ key.double().transpose(-1, -2)) * scale
    return logits.softmax(dim=-1)[:, :, 0, 1:].float()


def received_attention(query: Tensor, key: Tensor, scale: float, skip: int) -> Tensor:
    """Return the attention that each patch receives, mean over all queries, (B, H, N) float32.

    Queries go through in chunks, so that no full attention map is held.

    Args:
        query: (B, H, skip + N, d).
        key: (B, H, skip + N, d).
        scale: factor of the logits.
        skip: leading tokens that are no patches; they are queries too, but their columns are dropped.
    """
    received = torch.zeros(key.shape[:-1], device=key.device)
    columns = key.float().transpose(-1, -2)
    for rows in query.float().split(QUERIES_AT_ONCE, dim=2):
        received += ((rows @ columns) * scale).softmax(dim=-1).sum(dim=2)
    return received[..., skip:] / query.shape[2]
