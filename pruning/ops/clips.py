"""Frames of a clip: tokens by frame, cosines of the same place at two times, and what a mask keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

FRAMES_AT_ONCE = 8
"""Frames that are widened to float64 together: all of 64 frames of 256 x 3584 would take 470 MB."""


def by_frame(values: Shaped[Tensor, "B N *rest"], frames: int) -> Shaped[Tensor, "B F L *rest"]:
    """Return the tokens (B, F * L, ...) of clips frame by frame, (B, F, L, ...)."""
    return values.unflatten(1, (frames, -1))


def cosine_in_time(
    features: Float[Tensor, "B F L C"],
    frames: Sequence[int],
    references: Sequence[int],
) -> Float[Tensor, "B P L"]:
    """Return the cosine of each token of some frames with the token at its place in another frame, (B, P, L) float32.

    Computed in float64 and rounded once: equal tokens have the cosine 1 whatever the batch is. A zero vector is similar
    to nothing.

    Args:
        features: (B, F, L, C).
        frames: the P frames.
        references: the frame that each is compared with.
    """
    found = []
    for start in range(0, len(frames), FRAMES_AT_ONCE):
        own = features[:, list(frames[start : start + FRAMES_AT_ONCE])].double()  # (B, p, L, C)
        other = features[:, list(references[start : start + FRAMES_AT_ONCE])].double()
        norms = own.norm(dim=-1).clamp(min=1e-8) * other.norm(dim=-1).clamp(min=1e-8)
        found.append(((own * other).sum(dim=-1) / norms).float())
    if not found:
        return features.new_zeros(len(features), 0, features.shape[2])
    return torch.cat(found, dim=1)


def ragged_positions(mask: Bool[Tensor, "B N"]) -> list[Int[Tensor, " K"]]:
    """Return the positions that a mask keeps, one (K_b,) per item."""
    return list(mask.nonzero()[:, 1].split(mask.sum(dim=1).tolist()))
