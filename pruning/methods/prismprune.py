"""PrismPrune: salient tokens by the mean over heads, diverse ones by the variance over heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruning.registry import register_pruner
from pruning.selection import ascending, cosine_similarity, farthest_points, top_k
from pruning.types import PruningError, Selection, VisualTokens, check_finite


@register_pruner("prismprune", paper="PrismPrune, supplementary material (CVPR 2026)", exact=False)
@dataclass(frozen=True)
class PrismPrune:
    """Decouple saliency and diversity in the [CLS] attention a[h, i] of the feature layer.

    K_sal tokens have the highest mean over heads. Of the others the ``pool_factor * K_div`` with the highest variance
    over heads are candidates, and farthest point sampling picks K_div of them.

    The supplement states neither the feature space, the metric nor the start of the sampling. Here it runs on
    pre-projector features; ``fps_start`` "salient" takes each token farthest from everything kept so far,
    "top_variance" starts from the candidate of highest variance. An odd budget gives the extra token to the salient
    side.

    Attributes:
        salient_ratio: K_sal / K (paper: 0.5, table 6).
        pool_factor: M / K_div (paper: 4, table 4); 0 means all remaining tokens.
        fps_start: "salient" or "top_variance".
        fps_metric: "cosine" or "l2".
    """

    salient_ratio: float = 0.5
    pool_factor: int = 4
    fps_start: str = "salient"
    fps_metric: str = "cosine"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attention"})

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 <= self.salient_ratio <= 1:
            raise PruningError(f"salient_ratio is a share in [0, 1], got {self.salient_ratio}")
        if self.pool_factor < 0:
            raise PruningError(f"pool_factor is 0 (all tokens) or a positive number, got {self.pool_factor}")
        if self.fps_start not in ("salient", "top_variance"):
            raise PruningError(f"fps_start is 'salient' or 'top_variance', got {self.fps_start!r}")
        if self.fps_metric not in ("cosine", "l2"):
            raise PruningError(f"fps_metric is 'cosine' or 'l2', got {self.fps_metric!r}")

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K), salient and diverse."""
        attention = check_finite(tokens.require("cls_attention"), "[CLS] attention")  # (B, H, N)
        diverse = int(keep * (1 - self.salient_ratio))
        salient = top_k(attention.mean(dim=1), keep - diverse)
        if not diverse:
            return Selection(ascending(salient))
        taken = torch.zeros_like(attention[:, 0], dtype=torch.bool).scatter(1, salient, True)
        variance = attention.var(dim=1, correction=0).masked_fill(taken, float("-inf"))
        rest = tokens.count - salient.shape[1]
        pool = top_k(variance, min(self.pool_factor * diverse or rest, rest))
        blocked = torch.ones_like(taken).scatter(1, pool, False)
        return Selection(ascending(torch.cat([salient, self._spread(tokens, salient, pool, blocked, diverse)], dim=1)))

    def _spread(self, tokens: VisualTokens, salient: Tensor, pool: Tensor, blocked: Tensor, diverse: int) -> Tensor:
        """Sample ``diverse`` farthest points (B, K_div) among the candidates ``pool``."""
        features = check_finite(tokens.features, "vision features")
        distance = torch.cdist(features, features) if self.fps_metric == "l2" else 1 - cosine_similarity(features)
        start = pool[:, :1] if self.fps_start == "top_variance" or not salient.shape[1] else salient
        batch = torch.arange(len(start), device=start.device)[:, None]
        nearest = distance[batch, start].amin(dim=1)  # (B, N), distance to the nearest starting token
        if start is salient:
            return farthest_points(distance, nearest, diverse, blocked)
        blocked = blocked.scatter(1, start, True)
        return torch.cat([start, farthest_points(distance, nearest, diverse - 1, blocked)], dim=1)
