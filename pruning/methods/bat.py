"""BAT: attentive tokens as they are, inattentive ones clustered by density peaks and merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunetune.pruning.ops.indexing import first_ranked, top_k
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
        attentive = (wanted * self.attentive_ratio).long()
        return self.mixed(tokens, wanted, attentive)

    def mixed(
        self,
        tokens: VisualTokens,
        wanted: Int[Tensor, " B"],
        attentive: Int[Tensor, " B"],
    ) -> Selection:
        """Return ``wanted`` (B,) tokens of which ``attentive`` (B,) are attentive and the others merged clusters."""
        numbers = wanted.tolist()
        if min(numbers) == tokens.count:
            return keep_all(tokens)
        features = tokens.finite("features")  # (B, N, C)
        attention = tokens.finite("cls_attention").mean(dim=1)  # (B, N)
        kept = first_ranked(top_k(attention, tokens.count), attentive)
        distance, _ = euclidean_distance(features)  # (B, N, N)
        peaks = self._peaks(distance, kept)
        centre = first_ranked(top_k(peaks, tokens.count), wanted - attentive)
        means = _cluster_means(features, attention, kept, centre, distance)

        output = torch.where(kept[..., None], features, means).to(tokens.features.dtype)  # (B, N, C)
        chosen = kept | centre
        # One row for all items, cut by the numbers that are on the host already: no further number is read back.
        positions = list(chosen.nonzero()[:, 1].split(numbers))
        merged = list(output[chosen].split(numbers))
        if len(set(numbers)) == 1:
            return Selection(torch.stack(positions), merged, positions)
        return Selection(positions, merged, positions)

    def _peaks(
        self,
        distance: Float[Tensor, "B N N"],
        kept: Bool[Tensor, "B N"],
    ) -> Float[Tensor, "B N"]:
        """Return density times distance to the nearest denser token (B, N); attentive tokens come last."""
        infinity = float("inf")
        # Attentive tokens are infinitely far: they are nobody's neighbour, and in no cluster.
        with_kept = kept[:, None, :] | kept[:, :, None]
        apart = distance.masked_fill(with_kept, infinity)  # (B, N, N)
        real = apart.isfinite()

        # Squared distances count relative to the item's own mean: real features are so wide and long (1024 channels of
        # norm 30 in the test) that exp(-distance^2) is 0 for every token, and the centres would be the first indices.
        zeroed = apart.masked_fill(~real, 0)
        scale = zeroed.square().sum((1, 2)) / real.sum((1, 2)).clamp(min=1)  # (B,)
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        # One neighbour more, for the nearest token of each is itself.
        number = min(self.neighbours + 1, apart.shape[1])
        near = apart.topk(number, largest=False).values  # (B, N, number)
        squares = near.nan_to_num(posinf=0).square()
        mean = squares.sum(-1) / near.isfinite().sum(-1).clamp(min=1)  # (B, N)
        density = torch.exp(-mean / scale[:, None])

        denser = density[:, None, :] > density[:, :, None]
        gap = apart.masked_fill(~denser, infinity).amin(dim=-1)  # (B, N)
        # Nothing is denser than the densest token: it counts as far as anything is, and becomes a centre.
        widest = zeroed.amax(dim=(1, 2))
        gap = torch.where(gap.isinf(), widest[:, None], gap)
        return (density * gap).masked_fill(kept, -infinity)


def _cluster_means(
    features: Float[Tensor, "B N C"],
    attention: Float[Tensor, "B N"],
    kept: Bool[Tensor, "B N"],
    centre: Bool[Tensor, "B N"],
    distance: Float[Tensor, "B N N"],
) -> Float[Tensor, "B N C"]:
    """Return at every centre the mean of its cluster, weighted by attention; elsewhere zeros."""
    to_centres = distance.masked_fill(~centre[:, None, :], float("inf"))
    nearest = to_centres.argmin(dim=-1)  # (B, N)
    index = torch.arange(features.shape[1], device=features.device)
    nearest = torch.where(centre, index, nearest)  # of two equal centres each keeps itself
    # Attention may be 0; the floor lets such a token still stand for itself.
    weight = torch.where(kept, 0, attention.clamp(min=1e-12))
    # As a product: atomic additions on a GPU would change the last bits from run to run.
    member = torch.zeros_like(distance)  # (B, centre, token)
    member = member.scatter(1, nearest[:, None], weight[:, None])
    total = member.sum(dim=-1, keepdim=True)
    return (member @ features) / total.clamp(min=1e-30)  # a row that is no centre's holds nothing
