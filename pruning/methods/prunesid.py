"""PruneSID: tokens grouped by the principal direction they load on, and of each group the attended and unlike ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunetune.pruning.ops.greedy import pick_spread
from prunetune.pruning.ops.indexing import ascending, mask_of, positions_of, ranks_of, rows_of, top_k
from prunetune.pruning.ops.output_order import copies
from prunetune.pruning.ops.similarity import cosine_similarity
from prunetune.pruning.options import check_choice
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all

TOKENS_PER_GROUP = 4  # published: one group for every four tokens of the budget
NO_DIRECTION = 1e-14
"""An eigenvalue below this share of the largest is rounding, and its vector stands for no direction."""


@register_pruner("prunesid", paper="PruneSID, arXiv 2603.09480", merges=True, golden=True)
@dataclass(frozen=True)
class PruneSID:
    """Group tokens by principal directions, suppress the similar within a group, and keep the best of every group.

    A token belongs to the one of ``K / 4`` right singular vectors on which it loads most. Within a group the most
    attended token suppresses all whose cosine to it exceeds the mean cosine times K / 32, and so on; groups get tokens
    in proportion to how many were not suppressed. [CLS] is the first of the K tokens.

    Differs from the published code: the singular vectors are exact (there ``torch.pca_lowrank``, whose answer depends
    on the state of the random generator: two runs share 18 to 152 tokens of 31 to 191, see the golden cases); budgets
    below 4 have one group; where sums of bounds exceed the budget it is still met; tokens stay in raster order, [CLS]
    on the most attended place that is free (``order: published`` hands on [CLS], then group after group).

    Attributes:
        count_cls: whether [CLS] is one of the K tokens, as published; else K patches are kept and no [CLS].
        order: "raster" or "published", which needs ``position_policy: compact``.
    """

    count_cls: bool = True
    order: str = "raster"

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("order", self.order, ("raster", "published"))

    @property
    def needs(self) -> frozenset[str]:
        """[CLS] attention, and [CLS] itself where it is kept."""
        return frozenset({"cls_attention", "cls_feature"} if self.count_cls else {"cls_attention"})

    @property
    def merges(self) -> bool:
        """Whether outputs are others than kept tokens in their place."""
        return self.count_cls or self.order == "published"

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K), with [CLS] and its position where it is counted."""
        if keep == tokens.count:
            return keep_all(tokens)
        attention = tokens.finite("cls_attention").sum(dim=1)  # (B, N)
        features = tokens.finite("features")
        patches = self.patches(features, attention, keep)
        in_order = self.order == "published"
        if not self.count_cls:
            return copies(patches, tokens.count, in_order) if in_order else Selection(ascending(patches))
        if not in_order:
            patches = ascending(patches)
        by_attention = top_k(attention, tokens.count)
        is_taken = mask_of(patches, tokens.count).gather(1, by_attention)  # (B, N), the most attended first
        cls_position = by_attention.gather(1, is_taken.long().argmin(dim=1, keepdim=True))  # (B, 1)
        outputs = torch.cat([tokens.finite("cls_feature")[:, None], rows_of(features, patches)], dim=1)
        origin = torch.cat([torch.full_like(cls_position, -1), patches], dim=1)
        return Selection(
            ascending(torch.cat([cls_position, patches], dim=1)),
            merged=list(outputs.to(tokens.features.dtype)),
            origin=list(origin),
            in_order=in_order,
        )

    def patches(
        self,
        features: Float[Tensor, "B N C"],
        attention: Float[Tensor, "B N"],
        keep: int,
    ) -> Int[Tensor, "B P"]:
        """Return the kept patches, (B, K - 1) with [CLS] counted and else (B, K), group after group."""
        wanted = keep - int(self.count_cls)
        groups = max(1, keep // TOKENS_PER_GROUP)
        group = group_of(features, groups)  # (B, N)
        order, survives = self._ranked(features, attention, group, keep)
        # Group after group, and within a group those that were not suppressed first: a stable sort keeps that order.
        by_group = group.gather(1, order).sort(dim=1, stable=True).indices
        order = order.gather(1, by_group)
        ordered_group = group.gather(1, order)
        size = _counted(group, torch.ones_like(group), groups)  # (B, g)
        start = size.cumsum(dim=1) - size
        rank = torch.arange(order.shape[1], device=order.device) - start.gather(1, ordered_group)
        seats = seats_of(size, _counted(group, survives.long(), groups), keep, wanted)
        is_kept = rank < seats.gather(1, ordered_group)
        return order.gather(1, positions_of(is_kept, wanted))

    def _ranked(
        self,
        features: Float[Tensor, "B N C"],
        attention: Float[Tensor, "B N"],
        group: Int[Tensor, "B N"],
        keep: int,
    ) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]]:
        """Return all positions (B, N), suppressed tokens last, each part by attention; and which (B, N) are not.

        A token's state is minus its rank by attention; being suppressed takes N away. "Pick the highest state, let the
        pick's row lower the others" is what the greedy selections share, and runs in their kernel.
        """
        count = attention.shape[1]
        order = top_k(attention, count)
        # Rounded from float64, so that equal tokens have equal cosines: the threshold may be exactly theirs.
        cosine = cosine_similarity(rows_of(features, order), dtype=torch.float64).float()  # (B, N, N), by rank
        pairs = max(count * (count - 1) // 2, 1)
        mean = cosine.double().triu(1).sum(dim=(1, 2)) / pairs
        ranked_group = group.gather(1, order)
        same_group = ranked_group[:, :, None] == ranked_group[:, None]
        near = (cosine.double() > (mean * keep / 32)[:, None, None]) & same_group
        rank = torch.arange(count, device=order.device, dtype=torch.float32)
        last = -(rank + count)
        attended = attention.gather(1, order) > 0  # a token without attention is never taken
        state = torch.where(attended, -rank, last)
        picks = pick_spread(torch.where(near, last[None, None, :], 0.0), state, count, "minimum")
        step = ranks_of(picks)
        # Suppressed is what a more attended token, which was picked before, resembles: those suppressed come later.
        before = (rank[:, None] < rank[None, :]) & (step[:, :, None] < step[:, None, :])  # (B, by, whom)
        survives = attended & ~(near & before).any(dim=1)
        return order.gather(1, picks), torch.empty_like(survives).scatter_(1, order, survives)


def group_of(
    features: Float[Tensor, "B N C"],
    groups: int,
) -> Int[Tensor, "B N"]:
    """Return the principal direction (B, N) that each token loads on most, the strongest direction being 0.

    The directions are the right singular vectors of the sigmoid of the features, each token's mean over its channels
    taken away.
    """
    values = features.double().sigmoid()
    centred = values - values.mean(dim=-1, keepdim=True)  # (B, N, C)
    # Eigenvectors of the Gram matrix are the singular vectors, in float64 far beyond what separates directions.
    if centred.shape[1] <= centred.shape[2]:
        eigenvalues, vectors = torch.linalg.eigh(centred @ centred.transpose(1, 2))
        loadings = vectors
    else:
        eigenvalues, vectors = torch.linalg.eigh(centred.transpose(1, 2) @ centred)
        # The lengths of these columns are the singular values, which are divided out.
        loadings = centred @ vectors / eigenvalues.clamp(min=torch.finfo(torch.float64).tiny).sqrt()[:, None]
    eigenvalues = eigenvalues.flip(1)[:, :groups]  # ascending in torch
    loadings = loadings.flip(2)[:, :, :groups].abs()  # (B, N, g)
    weakest = NO_DIRECTION * eigenvalues[:, :1]
    return loadings.masked_fill((eigenvalues <= weakest)[:, None], -1).argmax(dim=-1)


def seats_of(
    size: Int[Tensor, "B g"],
    taken: Int[Tensor, "B g"],
    keep: int,
    wanted: int,
) -> Int[Tensor, "B g"]:
    """Return how many tokens each group keeps, (B, g), ``wanted`` in all.

    Args:
        size: (B, g) tokens of each group.
        taken: (B, g) how many of them were not suppressed.
        keep: K, of which the bounds are made.
        wanted: K, less one where [CLS] is counted.
    """
    least = size.clamp(max=1)
    most = torch.minimum(size, taken).clamp(max=5 * -(-keep // 64))
    # While the groups could not fill the budget, all may keep one more: the first round in which they can.
    rounds = torch.arange(keep + 1, device=size.device)
    room = torch.minimum(most[..., None] + rounds, size[..., None])  # (B, g, rounds)
    short = room.sum(dim=1) < keep
    extra = short.sum(dim=1, keepdim=True)  # (B, 1)
    most = torch.minimum(most + extra, size)

    spare = (wanted - least.sum(dim=1, keepdim=True)).clamp(min=0)  # (B, 1)
    # Rounded cumulative shares, half to even, so that all shares together are the whole. Shares are divided before they
    # are summed, as published: halves are common, and the rounding of the sum decides them.
    total = taken.sum(dim=1, keepdim=True).double().clamp(min=1)
    reached = ((taken / total).cumsum(dim=1) * spare).round().long()
    seats = torch.minimum(least + reached.diff(dim=1, prepend=reached[:, :1] * 0), most)
    # What bounds took away goes to the groups with most tokens left, as far as each has room.
    order = top_k(taken, taken.shape[1])
    open_seats = (most - seats).gather(1, order)
    missing = wanted - seats.sum(dim=1, keepdim=True)
    before = open_seats.cumsum(dim=1) - open_seats
    given = torch.minimum((missing - before).clamp(min=0), open_seats)
    return seats + torch.empty_like(given).scatter_(1, order, given)


def _counted(
    group: Int[Tensor, "B N"],
    weight: Int[Tensor, "B N"],
    groups: int,
) -> Int[Tensor, "B g"]:
    """Return the sum of ``weight`` (B, N) over the tokens of each group, (B, g)."""
    total = torch.zeros(len(group), groups, dtype=torch.long, device=group.device)
    return total.scatter_add_(1, group, weight)
