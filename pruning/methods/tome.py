"""ToMe: bipartite soft matching, repeated until K tokens are left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prunetune.pruning.ops.indexing import ascending, rows_of
from prunetune.pruning.options import check_choice
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all


@dataclass(frozen=True)
class Merged:
    """Tokens while they are merged, t of them per item.

    Attributes:
        metric: (B, t, d) what is compared.
        features: (B, t, C) size-weighted means.
        size: (B, t, 1) how many input tokens each stands for.
        first: (B, t) an input token of each, its own position.
        assignment: (B, N) the output row of every input token.
    """

    metric: Tensor
    features: Tensor
    size: Tensor
    first: Tensor
    assignment: Tensor


@register_pruner("tome", paper="Token Merging, arXiv 2210.09461", merges=True, golden=True)
@dataclass(frozen=True)
class ToMe:
    """Merge tokens at even places into their most similar token at an odd place, best matches first, until K are left.

    Each step halves the tokens at most. A merged token is the mean of its parts, weighted by how many tokens they stand
    for, and so is its metric. The output is in the published order: unmerged tokens by falling similarity, then the odd
    places.

    Differs from the published code: there one step runs in every block of the vision tower; here all run on its output.

    Attributes:
        metric: "keys" of the feature layer, mean over heads, or the "features" themselves.
    """

    metric: str = "keys"

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("metric", self.metric, ("keys", "features"))

    @property
    def needs(self) -> frozenset[str]:
        """Key vectors, unless features are compared."""
        return frozenset({"keys"} if self.metric == "keys" else ())

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return merged features (K, C) per item, each placed at one of the tokens it stands for."""
        if keep == tokens.count:
            return keep_all(tokens)
        state = unmerged(tokens.finite(self.metric), tokens.finite("features"))
        while state.features.shape[1] > keep:
            state = merge_step(state, state.features.shape[1] - keep)
        merged = state.features.to(tokens.features.dtype)
        return Selection(ascending(state.first), list(merged), list(state.first))


def unmerged(metric: Tensor, features: Tensor) -> Merged:
    """Return all tokens, each standing for itself."""
    batch, count, _ = features.shape
    places = torch.arange(count, device=features.device).expand(batch, -1)
    return Merged(metric, features, features.new_ones(batch, count, 1), places, places)


def merge_step(state: Merged, remove: int, class_token: bool = False) -> Merged:
    """Remove up to ``remove`` tokens, at most half of them, by bipartite soft matching.

    Args:
        state: t tokens per item, float32.
        remove: how many to merge away.
        class_token: token 0 is [CLS]: it never merges away, and the unmerged keep their order.
    """
    count = state.features.shape[1]
    remove = min(remove, (count - int(class_token)) // 2)
    if remove <= 0:
        return state
    unit = F.normalize(state.metric, dim=-1)
    scores = unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)  # (B, even, odd)
    if class_token:
        scores[:, 0] = float("-inf")
    best, target = scores.max(dim=-1)
    order = best.sort(dim=-1, descending=True, stable=True).indices
    source, stay = order[:, :remove], order[:, remove:]
    stay = ascending(stay) if class_token else stay
    into = target.gather(1, source)  # (B, r), place among the odd
    member = F.one_hot(into, count // 2).transpose(1, 2).to(state.features)  # (B, odd, r)

    def merge(values: Tensor, weight: Tensor) -> Tensor:
        even, odd = (values * weight)[:, 0::2], (values * weight)[:, 1::2]
        # As a product and not by atomic additions, whose order on a GPU would change the last bits from run to run.
        return torch.cat([rows_of(even, stay), odd + member @ rows_of(even, source)], dim=1)

    size = merge(state.size, torch.ones_like(state.size))
    unmerged_count = stay.shape[1]
    row = torch.empty(len(order), count, dtype=torch.long, device=order.device)  # the new row of every old token
    row[:, 1::2] = unmerged_count + torch.arange(count // 2, device=order.device)
    row[:, 0::2] = (
        torch.empty_like(order)
        .scatter(1, source, unmerged_count + into)
        .scatter(1, stay, torch.arange(unmerged_count, device=order.device).expand_as(stay))
    )
    return Merged(
        merge(state.metric, state.size) / size,
        merge(state.features, state.size) / size,
        size,
        torch.cat([state.first[:, 0::2].gather(1, stay), state.first[:, 1::2]], dim=1),
        row.gather(1, state.assignment),
    )
