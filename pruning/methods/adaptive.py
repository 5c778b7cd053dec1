"""Adaptive pruning: how many similar tokens go, or how budgets are mixed, follows the complexity of the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunetune.pruning.errors import PruningError
from prunetune.pruning.methods.bat import BAT
from prunetune.pruning.methods.divprune import loneliest
from prunetune.pruning.ops.complexity import MEASURES, attention_entropy, erank
from prunetune.pruning.ops.duplicates import without_duplicates_each
from prunetune.pruning.ops.greedy import pick_spread
from prunetune.pruning.ops.indexing import mask_of, rows_of, top_k
from prunetune.pruning.ops.similarity import cosine_distance, cosine_similarity
from prunetune.pruning.options import check_choice, check_least, check_share
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens

VARIANTS = ("threshold", "vispruner", "bat", "divprune_fastervlm")
COUNTS = ("fixed", "adaptive")
REMOVED_PER_ROUND = 8


@register_pruner("adaptive", paper="An Empirical Study of Attention and Diversity for Adaptive Visual Token Pruning")
@dataclass(frozen=True)
class Adaptive:
    """Prune complex images for diversity and simple ones for attention.

    Variant "threshold" (section 4.3, equation 6) walks the tokens by falling [CLS] attention, takes the next one not
    yet removed and removes every remaining token whose cosine distance to it is below ``tau_i = order_i * scale *
    complexity / average``, capped by ``tau_max``, until K are kept. If the pool runs dry, the removed tokens with the
    highest attention fill the budget.

    The other variants mix a share of tokens chosen by attention with diverse ones (tables 5 and 6): as VisPruner, as
    BAT, or FasterVLM's with DivPrune's. The share is ``share + slope * (1 - complexity / average)``, within [0, 1].

    No code was published, and the paper states neither tau_max, nor the linear map, nor what order_i counts when tokens
    are removed: here it is the rank among all tokens by attention.

    Attributes:
        variant: "threshold", "vispruner", "bat" or "divprune_fastervlm".
        complexity: "erank" of the projected tokens, or "attention_entropy".
        erank_avg: mean over a data sample; the default is the paper's for LLaVA-1.5-7B on MME, quoted. Measure it for
            your model with ``prunetune calibrate``.
        entropy_avg: the same for the entropy in nats (paper: 4.80 on MME, quoted).
        scale: factor of equation 6 (paper: 0.01).
        tau_max: cap of the threshold; the paper names none, 0.5 is the largest value it tried.
        count: "fixed" keeps K; "adaptive" keeps ``K * complexity / average``, at least ``1 - max_fewer`` of K.
        max_fewer: the largest reduction for simple images (paper: 0.2).
        share: share by attention for an image of average complexity.
        slope: how fast the share falls with complexity; negative is the paper's inverse ablation.
    """

    variant: str = "threshold"
    complexity: str = "erank"
    erank_avg: float = 94.87
    entropy_avg: float = 4.80
    scale: float = 0.01
    tau_max: float = 0.5
    count: str = "fixed"
    max_fewer: float = 0.2
    share: float = 0.5
    slope: float = 0.5

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("variant", self.variant, VARIANTS)
        check_choice("complexity", self.complexity, MEASURES)
        check_choice("count", self.count, COUNTS)
        for name in ("erank_avg", "entropy_avg"):
            if getattr(self, name) <= 0:
                raise PruningError(f"{name} is a positive number, got {getattr(self, name)}; see prunetune calibrate")
        for name in ("max_fewer", "share"):
            check_share(name, getattr(self, name))
        check_least("scale", self.scale, 0)
        check_least("tau_max", self.tau_max, 0)

    @property
    def needs(self) -> frozenset[str]:
        """[CLS] attention."""
        return frozenset({"cls_attention"})

    @property
    def merges(self) -> bool:
        """Whether the variant merges."""
        return self.variant == "bat"

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K), or K_b per item with an adaptive count; variant "bat" also merges."""
        relative = self._relative(tokens)
        wanted = torch.full_like(relative, keep, dtype=torch.long)
        if self.count == "adaptive":
            wanted = (keep * relative.clamp(min=1 - self.max_fewer)).round().long().clamp(1, tokens.count)
        if self.variant == "threshold":
            return selection_of(self._walk(tokens, wanted, relative), wanted)
        share = (self.share + self.slope * (1 - relative)).clamp(0, 1)
        attended = (wanted * share.double()).long()  # rounded down, as VisPruner's share is
        if self.variant == "bat":
            return BAT().mixed(tokens, wanted, attended)
        order = top_k(tokens.finite("cls_attention").mean(dim=1), tokens.count)
        place = torch.arange(tokens.count, device=order.device)
        kept = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, place < attended[:, None])
        if self.variant == "vispruner":
            similarity = cosine_similarity(tokens.finite("features"), dtype=torch.float64)  # as VisPruner
            left = (wanted - attended).tolist()
            diverse = without_duplicates_each(similarity, order, attended.tolist(), left, REMOVED_PER_ROUND)
            return selection_of(kept | diverse, wanted)
        return selection_of(_add_distant(tokens, kept, attended, wanted), wanted)

    def _relative(self, tokens: VisualTokens) -> Tensor:
        """Return each item's complexity over the average, (B,)."""
        if self.complexity == "erank":
            return erank(tokens.finite("projected")) / self.erank_avg
        return attention_entropy(tokens.finite("cls_attention")) / self.entropy_avg

    def _walk(self, tokens: VisualTokens, wanted: Tensor, relative: Tensor) -> Tensor:
        """Return the tokens (B, N) that the threshold walk keeps.

        Places are ranks by attention. A token's state is minus its rank; removing it takes N away, so that removed
        tokens come after all others, and among themselves by attention. The walk then is "pick the highest state, let
        the pick's row lower the others", which is what the greedy selections share.
        """
        order = top_k(tokens.finite("cls_attention").mean(dim=1), tokens.count)
        distance = cosine_distance(rows_of(tokens.finite("projected"), order))  # (B, N, N), by rank
        rank = torch.arange(tokens.count, device=order.device, dtype=torch.float32)
        threshold = ((rank + 1) * self.scale * relative[:, None]).clamp(max=self.tau_max)
        removed = torch.where(distance < threshold[..., None], -(rank + tokens.count), 0)
        picks = pick_spread(removed, -rank.expand_as(order), int(wanted.max()), "minimum")
        in_time = torch.arange(picks.shape[1], device=order.device) < wanted[:, None]
        return torch.zeros_like(order).scatter_reduce(1, order.gather(1, picks), in_time.long(), "amax").bool()


def _add_distant(tokens: VisualTokens, kept: Tensor, attended: Tensor, wanted: Tensor) -> Tensor:
    """Return ``kept`` (B, N) and the tokens farthest from all kept, up to ``wanted`` (B,), by DivPrune's rule."""
    distance = cosine_distance(tokens.finite("projected"))
    alone = mask_of(loneliest(distance, torch.zeros_like(kept))[:, None], tokens.count)
    kept = torch.where(attended[:, None] > 0, kept, alone)  # without attended tokens it starts as DivPrune does
    nearest = distance.masked_fill(~kept[:, None, :], float("inf")).amin(dim=-1)
    left = wanted - attended.clamp(min=1)
    # Items that need fewer go on picking; what they pick then does not count.
    picks = pick_spread(distance, nearest, max(int(left.max()), 0), "minimum", kept)
    in_time = torch.arange(picks.shape[1], device=kept.device) < left[:, None]
    return torch.zeros_like(kept, dtype=torch.long).scatter_reduce(1, picks, in_time.long(), "amax").bool() | kept


def selection_of(kept: Tensor, wanted: Tensor) -> Selection:
    """Return a mask (B, N) with ``wanted`` (B,) tokens per item as a selection, ragged where the numbers differ."""
    positions = kept.nonzero()[:, 1]
    numbers = wanted.tolist()
    if len(set(numbers)) == 1:
        return Selection(positions.view(len(numbers), -1))
    return Selection(list(positions.split(numbers)))
