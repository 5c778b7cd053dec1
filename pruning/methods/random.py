"""A random subset, seeded by the picture itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunetune.pruning.ops.indexing import ascending, top_k
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens

_MASK = (1 << 31) - 1


@register_pruner("random", paper="baseline")
@dataclass(frozen=True)
class Random:
    """Keep K tokens drawn uniformly without replacement.

    The draw depends on ``seed`` and on the picture's pixels only, so a picture keeps the same tokens in any batch,
    on any device and in both arms, while different pictures keep different ones.
    """

    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset({"image_key"})

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return the K positions (B, K) with the highest pseudo-random numbers."""
        key = tokens.require("image_key") + self.seed * 0x9E3779B1
        positions = torch.arange(tokens.count, device=key.device)
        noise = _scramble(_scramble(key & _MASK)[:, None] + _scramble(positions + 1)[None, :])
        return Selection(ascending(top_k(noise, keep)))


def _scramble(value: Tensor) -> Tensor:
    """Mix the bits of non-negative integers into 0..2^31-1; integer arithmetic only, so equal on every device."""
    for factor in (0x45D9F3B, 0x119DE1F3):
        value = ((value ^ (value >> 16)) * factor) & _MASK
    return value ^ (value >> 15)
