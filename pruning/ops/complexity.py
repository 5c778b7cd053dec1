"""How complex an image is: effective rank of its tokens, and entropy of the [CLS] attention."""

from __future__ import annotations

import torch
from torch import Tensor

MEASURES = ("erank", "attention_entropy")


def erank(features: Tensor) -> Tensor:
    """Return the effective rank (B,) of tokens (B, N, D), by the eigenvalues of their N x N Gram matrix.

    Equations 3 and 7 of the adaptive pruning study: the exponential of the entropy of the normalised singular values;
    between 1 and min(N, D). All-zero tokens have 1.
    """
    # Singular values are roots: noise of 1e-7 in a float32 product would count as 3e-4 in every empty direction.
    features = features.double()
    if features.shape[1] > features.shape[2]:
        features = features.transpose(1, 2)
    values = torch.linalg.eigvalsh(features @ features.transpose(1, 2)).clamp(min=0).sqrt()
    return torch.exp(_entropy(values)).float()


def attention_entropy(attention: Tensor) -> Tensor:
    """Return the entropy (B,) in nats of the head-averaged [CLS] attention (B, H, N), equations 1 and 2."""
    return _entropy(attention.float().mean(dim=1).double()).float()


def _entropy(weights: Tensor) -> Tensor:
    """Return the entropy (B,) of non-negative weights (B, L), normalised to sum 1."""
    share = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.special.entr(share).sum(dim=-1)
