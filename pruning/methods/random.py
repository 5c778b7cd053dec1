"""A random subset, seeded by the image itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from prunetune.pruning.ops.indexing import ascending, top_k
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens

_MASK = (1 << 31) - 1


@register_pruner("random", paper="baseline")
@dataclass(frozen=True)
class Random:
    """Keep K tokens drawn uniformly without replacement.

    The draw depends on ``seed`` and on the image's pixels only, so an image keeps the same tokens in any batch,
    on any device and in both arms, while different images keep different ones.
    """

    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset({"image_key"})

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return the K positions (B, K) with the highest pseudo-random numbers."""
        # The golden ratio's bits spread neighbouring seeds over the whole range (Fibonacci hashing).
        key = tokens.require("image_key") + self.seed * 0x9E3779B1  # (B,)
        positions = torch.arange(tokens.count, device=key.device)
        of_image = _scramble(key & _MASK)[:, None]
        of_position = _scramble(positions + 1)[None, :]
        # A hash instead of a generator: torch's generators give other numbers on another device or in another batch.
        noise = _scramble(of_image + of_position)  # (B, N)
        return Selection(ascending(top_k(noise, keep)))


def _scramble(value: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """Mix the bits of non-negative integers into 0..2^31-1; integer arithmetic only, so equal on every device."""
    # Both factors are below 2^30, so that no product leaves int64.
    for factor in (0x45D9F3B, 0x119DE1F3):
        value = ((value ^ (value >> 16)) * factor) & _MASK
    return value ^ (value >> 15)
