"""Down-sampling: the feature grid itself, area-pooled to K regions."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunetune.pruning.errors import PruningError
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all


@register_pruner("downsample", paper="the baseline of VTC-Bench, arXiv 2510.07143", merges=True)
@dataclass(frozen=True)
class Downsample:
    """Pool the patch grid into exactly K regions of nearly equal area and average the features of each.

    The grid is cut into about sqrt(K * rows / columns) strips, and the K regions are dealt to the strips as evenly as
    possible; a patch that lies in two regions counts in each by its covered area. With K = N every region is one patch.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return the region means as merged features (K, C), placed at each region's central patch.

        Raises:
            PruningError: if the tokens form no grid.
        """
        if keep == tokens.count:
            return keep_all(tokens)
        if tokens.grid is None:
            raise PruningError(
                "downsample pools a patch grid, but these tokens form none; choose another pruner, or scope: item"
            )
        weights, centers = pooling(*tokens.grid, keep)
        features = tokens.finite("features")
        merged = (weights.to(features) @ features).to(tokens.features.dtype)  # (B, K, C)
        indices = centers.to(features.device).expand(len(features), -1)
        return Selection(indices, list(merged), list(indices))


@functools.cache
def pooling(rows: int, columns: int, keep: int) -> tuple[Tensor, Tensor]:
    """Return the pooling matrix (K, rows * columns), each row summing to 1, and the central patches (K,), ascending."""
    strips = max(round(math.sqrt(keep * rows / columns)), math.ceil(keep / columns), 1)
    per_strip = [keep // strips + (index < keep % strips) for index in range(strips)]
    weights, centers = [], []
    for strip, regions in enumerate(per_strip):
        down = _overlap(rows, strips)[strip]
        for region, across in enumerate(_overlap(columns, regions)):
            cell = down[:, None] * across[None, :]
            weights.append((cell / cell.sum()).flatten())
            middle = int((strip + 0.5) * rows / strips), int((region + 0.5) * columns / regions)
            centers.append(middle[0] * columns + middle[1])
    return torch.stack(weights), torch.tensor(centers)


def _overlap(cells: int, regions: int) -> Tensor:
    """Return how much of each of ``cells`` unit lengths lies in each of ``regions`` equal parts, (regions, cells)."""
    edges = torch.linspace(0, cells, regions + 1)
    low = torch.maximum(edges[:-1, None], torch.arange(cells)[None, :])
    high = torch.minimum(edges[1:, None], torch.arange(1, cells + 1)[None, :])
    return (high - low).clamp(min=0)
