"""Adaptive pruning: how many similar tokens go, or how budgets are mixed, follows the complexity of the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from prunetune.pruning.errors import PruningError
from prunetune.pruning.fitting import Mean, Report
from prunetune.pruning.methods.adaptive_variants import (
    ORDERS,
    REFILLS,
    ItemBudgets,
    Variant,
    mixed_with_bat,
    mixed_with_divprune,
    mixed_with_vispruner,
    threshold_walk,
)
from prunetune.pruning.ops.complexity import MEASURES, attention_entropy, erank
from prunetune.pruning.options import check_choice, check_least, check_share
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens

# The one table of variants: the option's choices, its check and its call all come from here.
VARIANTS: dict[str, Variant] = {
    "threshold": threshold_walk,
    "vispruner": mixed_with_vispruner,
    "bat": mixed_with_bat,
    "divprune_fastervlm": mixed_with_divprune,
}
MERGING = ("bat",)
COUNTS = ("fixed", "adaptive")


def _erank(tokens: VisualTokens) -> Float[Tensor, " B"]:
    return erank(tokens.finite("projected"))


def _entropy(tokens: VisualTokens) -> Float[Tensor, " B"]:
    return attention_entropy(tokens.finite("cls_attention"))


def _dry(pruner: Adaptive, tokens: VisualTokens, selection: Selection) -> Shaped[Tensor, " B"] | None:
    # Of a walk that mostly runs dry the threshold is too large, and attention alone decides what fills the budget.
    return selection.notes.get("ran_dry")


@register_pruner(
    "adaptive",
    paper="An Empirical Study of Attention and Diversity for Adaptive Visual Token Pruning",
    exact=False,
    fits=[
        Mean("erank_avg", counts=lambda pruner: pruner.complexity == "erank", measure=_erank),
        Mean("entropy_avg", counts=lambda pruner: pruner.complexity == "attention_entropy", measure=_entropy),
    ],
    reports=[Report("walk ran dry", _dry)],
)
@dataclass(frozen=True)
class Adaptive:
    """Prune complex images for diversity and simple ones for attention.

    Variant "threshold" (section 4.3, equation 6) walks the tokens by falling [CLS] attention, takes the next one not
    yet removed and removes every remaining token whose cosine distance to it is below ``tau_i = order_i * scale *
    complexity / average``, capped by ``tau_max``, until K are kept. If the pool runs dry, ``refill`` says which of the
    removed tokens fill the budget. Of an average image the threshold reaches 0.5 at the fiftieth rank, so it may well.
    A selection notes how many tokens the walk itself picked, ``walked``, and whether it ran dry, ``ran_dry``.

    The other variants mix a share of tokens chosen by attention with diverse ones (tables 5 and 6): as VisPruner, as
    BAT, or FasterVLM's with DivPrune's. The share is ``share + slope * (1 - complexity / average)``, within [0, 1].

    A reconstruction: no code was published, and the paper states neither tau_max, nor the linear map of the mixes, nor
    what order_i counts when tokens are removed (``order``), nor what happens when the pool runs dry (``refill``).

    Attributes:
        variant: "threshold", "vispruner", "bat" or "divprune_fastervlm".
        complexity: "erank" of the projected tokens, or "attention_entropy".
        erank_avg: mean over a data sample; the default is the paper's for LLaVA-1.5-7B on MME, quoted. Measure it for
            your model with ``prunetune calibrate``.
        entropy_avg: the same for the entropy in nats (paper: 4.80 on MME, quoted).
        scale: factor of equation 6 (paper: 0.01).
        tau_max: cap of the threshold; the paper names none, 0.5 is the largest value it tried.
        order: what order_i counts: "rank" is a token's rank by attention among all, "pick" its number among the kept,
            with which thresholds stay small and the walk seldom runs dry.
        refill: when the pool runs dry, of the removed tokens take the most attended ("attention"), the farthest from
            everything kept ("farthest"), or walk over them as over a new pool, as often as it takes ("again").
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
    order: str = "rank"
    refill: str = "attention"
    count: str = "fixed"
    max_fewer: float = 0.2
    share: float = 0.5
    slope: float = 0.5

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("variant", self.variant, tuple(VARIANTS))
        check_choice("complexity", self.complexity, MEASURES)
        check_choice("count", self.count, COUNTS)
        check_choice("order", self.order, ORDERS)
        check_choice("refill", self.refill, REFILLS)
        for name in ("erank_avg", "entropy_avg"):
            average = getattr(self, name)
            if average <= 0:
                raise PruningError(f"{name} is a positive number, got {average}; see prunetune calibrate")
        check_share("max_fewer", self.max_fewer)
        check_share("share", self.share)
        check_least("scale", self.scale, 0)
        check_least("tau_max", self.tau_max, 0)

    @property
    def needs(self) -> frozenset[str]:
        """[CLS] attention."""
        return frozenset({"cls_attention"})

    @property
    def merges(self) -> bool:
        """Whether the variant merges."""
        return self.variant in MERGING

    @property
    def servable(self) -> bool:
        """Whether the number of kept tokens is known before the image is encoded."""
        return self.count == "fixed"

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K), or K_b per item with an adaptive count; variant "bat" also merges."""
        return VARIANTS[self.variant](tokens, self._budgets(tokens, keep))

    def _budgets(self, tokens: VisualTokens, keep: int) -> ItemBudgets:
        """Return what the complexity of each item makes of the options."""
        relative = self._relative(tokens)  # (B,)
        wanted = torch.full_like(relative, keep, dtype=torch.long)
        if self.count == "adaptive":
            factor = relative.clamp(min=1 - self.max_fewer)
            wanted = (keep * factor).round().long().clamp(1, tokens.count)
        share = (self.share + self.slope * (1 - relative)).clamp(0, 1)
        attended = (wanted * share.double()).long()  # rounded down, as VisPruner's share is
        return ItemBudgets(wanted, attended, relative, self.scale, self.tau_max, self.order, self.refill)

    def _relative(self, tokens: VisualTokens) -> Float[Tensor, " B"]:
        """Return each item's complexity over the average, (B,)."""
        if self.complexity == "erank":
            return _erank(tokens) / self.erank_avg
        return _entropy(tokens) / self.entropy_avg
