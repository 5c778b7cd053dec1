"""VisionZip: [CLS], the tokens it attends to, and contextual tokens that carry the sum of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from prunetune.pruning.errors import PruningError
from prunetune.pruning.ops.indexing import ascending, mask_of, rows_of, top_k
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all


@register_pruner("visionzip", paper="VisionZip, arXiv 2412.04467", merges=True, golden=True)
@dataclass(frozen=True)
class VisionZip:
    """Keep [CLS] and the patches it attends to most (dominant); merge the rest into contextual tokens.

    Contextual targets are evenly spaced among the remaining patches. Every other remaining patch goes to the target
    with the most similar keys, and a target becomes its own feature plus the mean of those assigned to it. The output
    is [CLS], dominant patches in raster order, contextual tokens.

    Differs from the published code: the split is derived from the budget, so that it works for every K (there it is a
    pair of numbers); in LLaVA-1.6 the tokens of each crop stay together. With K = N nothing changes.

    Attributes:
        contextual_ratio: contextual / K, rounded half to even (the published splits 54 + 10, 108 + 20 and 162 + 30 are
            all 5 / 32). [CLS] counts among the dominant.
    """

    contextual_ratio: float = 5 / 32
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attention", "cls_feature", "keys"})

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 <= self.contextual_ratio < 1:
            raise PruningError(f"contextual_ratio is a share in [0, 1), got {self.contextual_ratio}")

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return merged features (K, C) per item; positions are dominant patches, targets, and one slot for [CLS]."""
        if keep == tokens.count:
            return keep_all(tokens)
        contextual = min(round(keep * self.contextual_ratio), keep - 1)
        order = top_k(tokens.finite("cls_attention").sum(dim=1), tokens.count)
        dominant = ascending(order[:, : keep - contextual - 1])
        features = tokens.finite("features")
        parts = [tokens.finite("cls_feature")[:, None], rows_of(features, dominant)]
        slots = [dominant]
        if contextual:
            taken = mask_of(dominant, tokens.count)
            rest = torch.sort(taken.long(), dim=1, stable=True).indices[:, : tokens.count - dominant.shape[1]]
            step = max(1, rest.shape[1] // contextual)
            chosen = torch.arange(contextual, device=rest.device) * step
            slots.append(rest[:, chosen])
            keys = F.normalize(rows_of(tokens.finite("keys"), rest), dim=-1)
            nearest = (keys @ keys[:, chosen].transpose(1, 2)).argmax(dim=-1)  # (B, R), the target of each
            member = F.one_hot(nearest, contextual).to(features)  # (B, R, contextual)
            member[:, chosen] = 0  # targets are assigned to nobody
            remaining = rows_of(features, rest)
            sums = member.transpose(1, 2) @ remaining
            parts.append(remaining[:, chosen] + sums / member.sum(dim=1).clamp(min=1)[..., None])
        kept = torch.cat(slots, dim=1)
        spare = mask_of(kept, tokens.count).gather(1, order).long().argmin(dim=1, keepdim=True)
        slot = order.gather(1, spare)  # the most attended patch that is in no other slot
        merged = torch.cat(parts, dim=1).to(tokens.features.dtype)
        origin = torch.cat([torch.full_like(slot, -1), kept], dim=1)
        return Selection(ascending(torch.cat([slot, kept], dim=1)), list(merged), list(origin))
