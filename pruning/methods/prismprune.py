"""PrismPrune: salient tokens by the mean over heads, diverse ones by the variance over heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunetune.pruning.errors import PruningError
from prunetune.pruning.methods.trimtokenator import METRICS
from prunetune.pruning.ops.greedy import pick_spread
from prunetune.pruning.ops.indexing import ascending, mask_of, rows_of, top_k
from prunetune.pruning.ops.similarity import cosine_distance, euclidean_distance
from prunetune.pruning.options import check_choice, check_share, whole
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens


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
        check_share("salient_ratio", self.salient_ratio)
        if self.pool_factor < 0:
            raise PruningError(f"pool_factor is 0 (all tokens) or a positive number, got {self.pool_factor}")
        check_choice("fps_start", self.fps_start, ("salient", "top_variance"))
        check_choice("fps_metric", self.fps_metric, METRICS)

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K), salient and diverse."""
        attention = tokens.finite("cls_attention")  # (B, H, N)
        diverse = whole(keep * (1 - self.salient_ratio))
        salient = top_k(attention.mean(dim=1), keep - diverse)  # (B, K_sal)
        if not diverse:
            return Selection(ascending(salient))
        taken = mask_of(salient, tokens.count)
        variance = attention.var(dim=1, correction=0).masked_fill(taken, float("-inf"))  # (B, N)
        rest = tokens.count - salient.shape[1]
        candidates = rest  # a factor of 0 takes all
        if self.pool_factor:
            candidates = min(self.pool_factor * diverse, rest)
        pool = top_k(variance, candidates)  # (B, M), the highest variance first
        best = pool[:, :1]
        # Ascending, so that of equally far candidates the lower index wins.
        spread = self._spread(tokens, salient, ascending(pool), best, diverse)
        return Selection(ascending(torch.cat([salient, spread], dim=1)))

    def _spread(
        self,
        tokens: VisualTokens,
        salient: Int[Tensor, "B K_sal"],
        pool: Int[Tensor, "B M"],
        best: Int[Tensor, "B 1"],
        diverse: int,
    ) -> Int[Tensor, "B K_div"]:
        """Sample ``diverse`` farthest points (B, K_div) among the candidates ``pool``."""
        from_best = self.fps_start == "top_variance" or not salient.shape[1]
        start = best if from_best else salient
        # Candidates and starting tokens alone are compared: 6.2 ms for N=2880, K=160, where the product of all tokens
        # takes 171 ms (docs/benchmarks.md).
        points = rows_of(tokens.finite("features"), torch.cat([pool, start], dim=1))  # (B, M + S, C)
        distance = self._distance(points)
        count = pool.shape[1]
        nearest = distance[:, :count, count:].amin(dim=-1)  # (B, M), distance to the nearest starting token
        among = distance[:, :count, :count]
        if not from_best:
            return pool.gather(1, pick_spread(among, nearest, diverse, "minimum"))
        rest = pick_spread(among, nearest, diverse - 1, "minimum", blocked=pool == best)
        return torch.cat([best, pool.gather(1, rest)], dim=1)

    def _distance(self, points: Float[Tensor, "B P C"]) -> Float[Tensor, "B P P"]:
        """Return the distances of all pairs by ``fps_metric``."""
        if self.fps_metric == "cosine":
            return cosine_distance(points)
        distance, _ = euclidean_distance(points)
        return distance
