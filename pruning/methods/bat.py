"""BAT: attentive tokens as they are, inattentive ones clustered by density peaks and merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunetune.pruning.ops.indexing import top_k
from prunetune.pruning.ops.similarity import euclidean_distance
from prunetune.pruning.options import check_least, check_share
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all


@register_pruner("bat", paper="BAT (Beyond Attentive Tokens), CVPR 2023", merges=True, exact=False)
@dataclass(frozen=True)
class BAT:
    """Keep the tokens with the highest [CLS] attention, and one merged token per cluster of the others.

    Clusters are density peaks (Rodriguez and Laio): a centre is dense and far from anything denser; every inattentive
    token goes to its nearest centre, and a cluster is the mean of its tokens, weighted by attention.

    A reconstruction from the descriptions in other papers: importance by [CLS] attention, diversity by clustering and
    merging, mixed at a fixed ratio. The published method works inside a vision transformer, in several blocks.

    Attributes:
        attentive_ratio: share of the budget for attentive tokens, rounded down.
        neighbours: how many nearest tokens the density counts.
    """

    attentive_ratio: float = 0.5
    neighbours: int = 5
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attention"})

    def __post_init__(self) -> None:
        """Check the options."""
        check_share("attentive_ratio", self.attentive_ratio)
        check_least("neighbours", self.neighbours, 1)

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return features (K, C) per item in raster order; a merged cluster sits on its centre."""
        wanted = torch.full((len(tokens.features),), keep, device=tokens.features.device)
        return self.mixed(tokens, wanted, (wanted * self.attentive_ratio).long())

    def mixed(self, tokens: VisualTokens, wanted: Tensor, attentive: Tensor) -> Selection:
        """Return ``wanted`` (B,) tokens of which ``attentive`` (B,) are attentive and the others merged clusters."""
        numbers = wanted.tolist()
        if min(numbers) == tokens.count:
            return keep_all(tokens)
        features, attention = tokens.finite("features"), tokens.finite("cls_attention").mean(dim=1)
        order = top_k(attention, tokens.count)
        place = torch.arange(tokens.count, device=order.device)
        kept = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, place < attentive[:, None])
        distance, _ = euclidean_distance(features)
        peaks = self._peaks(distance, kept)
        centre = torch.zeros_like(kept).scatter(1, top_k(peaks, tokens.count), place < (wanted - attentive)[:, None])
        nearest = distance.masked_fill(~centre[:, None, :], float("inf")).argmin(dim=-1)  # (B, N)
        nearest = torch.where(centre, place, nearest)  # of two equal centres each keeps itself
        # Attention may be 0; the floor lets such a token still stand for itself.
        weight = torch.where(kept, 0, attention.clamp(min=1e-12))
        member = torch.zeros_like(distance).scatter(1, nearest[:, None], weight[:, None])  # (B, centre, token)
        means = (member @ features) / member.sum(dim=-1, keepdim=True).clamp(min=1e-30)
        output = torch.where(kept[..., None], features, means).to(tokens.features.dtype)
        chosen = kept | centre
        positions = list(chosen.nonzero()[:, 1].split(numbers))
        merged = list(output[chosen].split(numbers))
        return Selection(torch.stack(positions) if len(set(numbers)) == 1 else positions, merged, positions)

    def _peaks(self, distance: Tensor, kept: Tensor) -> Tensor:
        """Return density times distance to the nearest denser token (B, N); attentive tokens come last."""
        apart = distance.masked_fill(kept[:, None, :] | kept[:, :, None], float("inf"))
        near = apart.topk(min(self.neighbours + 1, apart.shape[1]), largest=False).values  # itself is one of them
        finite = near.isfinite()
        # Distances count relative to the item's own, so that features of any width and scale have peaks.
        scale = apart.masked_fill(apart.isinf(), 0).square().sum((1, 2)) / apart.isfinite().sum((1, 2)).clamp(min=1)
        mean = near.nan_to_num(posinf=0).square().sum(-1) / finite.sum(-1).clamp(min=1)
        density = torch.exp(-mean / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None])
        denser = density[:, None, :] > density[:, :, None]
        gap = apart.masked_fill(~denser, float("inf")).amin(dim=-1)
        widest = apart.masked_fill(apart.isinf(), 0).amax(dim=(1, 2))
        gap = torch.where(gap.isinf(), widest[:, None], gap)
        return (density * gap).masked_fill(kept, float("-inf"))
