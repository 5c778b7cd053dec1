"""Down-sampling: the feature grid itself, area-pooled to K regions."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all


@register_pruner("downsample", paper="the baseline of VTC-Bench, arXiv 2510.07143", merges=True, exact=False)
@dataclass(frozen=True)
class Downsample:
    """Pool the patch grid into exactly K regions of nearly equal area and average the features of each.

    The grid is cut into about sqrt(K * rows / columns) strips, and the K regions are dealt to the strips as evenly as
    possible; a patch that lies in two regions counts in each by its covered area. With K = N every region is one patch.

    A reconstruction: the benchmark shrinks the image itself; here the tower sees all of it and its features are pooled.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return the region means as merged features (K, C), placed at each region's central patch.

        Raises:
            PruningError: if the tokens form no grid.
        """
        if keep == tokens.count:
            return keep_all(tokens)
        weights, centers = pooling(*tokens.grid_for("downsample pools"), keep)
        features = tokens.finite("features")  # (B, N, C)
        merged = (weights.to(features) @ features).to(tokens.features.dtype)  # (B, K, C)
        indices = centers.to(features.device).expand(len(features), -1)
        return Selection(indices, list(merged), list(indices))


@functools.cache  # it depends on nothing but the grid and K, which a run has few of
def pooling(rows: int, columns: int, keep: int) -> tuple[Float[Tensor, "K N"], Int[Tensor, " K"]]:
    """Return the pooling matrix (K, rows * columns), each row summing to 1, and the central patches (K,), ascending.

    A grid of 1 row and 4 columns with K = 2 gives ``[[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]`` and ``[1, 3]``.
    """
    # Square regions have sqrt(K * rows / columns) strips; no strip may have more regions than columns.
    square = round(math.sqrt(keep * rows / columns))
    strips = max(square, math.ceil(keep / columns), 1)
    weights, centers = [], []
    for strip in range(strips):
        regions = keep // strips
        if strip < keep % strips:
            regions += 1
        down = _overlap(rows, strips)[strip]  # (rows,)
        middle_row = int((strip + 0.5) * rows / strips)
        for region, across in enumerate(_overlap(columns, regions)):
            cell = down[:, None] * across[None, :]  # (rows, columns)
            weights.append((cell / cell.sum()).flatten())
            middle_column = int((region + 0.5) * columns / regions)
            centers.append(middle_row * columns + middle_column)
    return torch.stack(weights), torch.tensor(centers)


def _overlap(cells: int, regions: int) -> Float[Tensor, "regions cells"]:
    """Return how much of each of ``cells`` unit lengths lies in each of ``regions`` equal parts, (regions, cells).

    3 cells in 2 regions give ``[[1, 0.5, 0], [0, 0.5, 1]]``.
    """
    edges = torch.linspace(0, cells, regions + 1)
    left = torch.arange(cells)[None, :]  # (1, cells)
    low = torch.maximum(edges[:-1, None], left)
    high = torch.minimum(edges[1:, None], left + 1)
    return (high - low).clamp(min=0)
