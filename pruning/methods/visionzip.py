"""VisionZip: [CLS], the tokens it attends to, and contextual tokens that carry the sum of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

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
        features = tokens.finite("features")  # (B, N, C)
        order = top_k(tokens.finite("cls_attention").sum(dim=1), tokens.count)  # (B, N)
        dominant = ascending(order[:, : keep - contextual - 1])  # one less: [CLS] itself is dominant

        outputs = [tokens.finite("cls_feature")[:, None], rows_of(features, dominant)]
        kept = dominant
        if contextual:
            targets, merged_targets = _contextual(features, tokens.finite("keys"), dominant, contextual)
            outputs.append(merged_targets)
            kept = torch.cat([dominant, targets], dim=1)
        merged = torch.cat(outputs, dim=1).to(tokens.features.dtype)  # (B, K, C)

        # [CLS] has no patch of its own: it sits on the most attended one that is not taken.
        is_taken = mask_of(kept, tokens.count).gather(1, order)  # (B, N), the most attended first
        first_free = is_taken.long().argmin(dim=1, keepdim=True)
        cls_position = order.gather(1, first_free)  # (B, 1)
        origin = torch.cat([torch.full_like(cls_position, -1), kept], dim=1)
        positions = ascending(torch.cat([cls_position, kept], dim=1))
        return Selection(positions, list(merged), list(origin))


def _contextual(
    features: Float[Tensor, "B N C"],
    keys: Float[Tensor, "B N d"],
    dominant: Int[Tensor, "B n"],
    number: int,
) -> tuple[Int[Tensor, "B number"], Float[Tensor, "B number C"]]:
    """Return evenly spaced targets among the patches that are not dominant, and their features with what they merge."""
    count = features.shape[1]
    taken = mask_of(dominant, count)
    # A stable sort of a mask moves the free patches to the front in raster order.
    in_raster_order = torch.sort(taken.long(), dim=1, stable=True).indices
    free = in_raster_order[:, : count - dominant.shape[1]]  # (B, R)
    step = max(1, free.shape[1] // number)
    chosen = torch.arange(number, device=free.device) * step
    unit = F.normalize(rows_of(keys, free), dim=-1)
    similarity = unit @ unit[:, chosen].transpose(1, 2)  # (B, R, number)
    nearest = similarity.argmax(dim=-1)  # (B, R), the target of each
    # As a product and not by atomic additions, whose order on a GPU would change the last bits from run to run.
    member = F.one_hot(nearest, number).to(features)  # (B, R, number)
    member[:, chosen] = 0  # targets are assigned to nobody
    remaining = rows_of(features, free)
    sums = member.transpose(1, 2) @ remaining  # (B, number, C)
    # A target that nothing is assigned to stays as it is: the floor divides its sum of 0.
    means = sums / member.sum(dim=1).clamp(min=1)[..., None]
    return free[:, chosen], remaining[:, chosen] + means
