"""PromPrune: how much of the budget goes to salient tokens follows the entropy of the image's spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunetune.pruning.errors import PruningError
from prunetune.pruning.fitting import Mean
from prunetune.pruning.ops.greedy import pick_determinantal
from prunetune.pruning.ops.indexing import first_ranked, mask_of_picks, positions_of, top_k
from prunetune.pruning.ops.output_order import copies
from prunetune.pruning.options import check_choice, check_least, check_share
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all


def _entropy(tokens: VisualTokens) -> Float[Tensor, " B"]:
    return spectral_entropy(tokens.finite("projected"))


@register_pruner(
    "promprune",
    paper="PromPrune, arXiv 2603.14892",
    golden=True,
    fits=[Mean("mu", counts=lambda pruner: pruner.share_min < pruner.share_max, measure=_entropy)],
)
@dataclass(frozen=True)
class PromPrune:
    """Split the budget between the most attended tokens and a determinantal point process over the others.

    The share of salient tokens falls from ``share_max`` to ``share_min`` as a sigmoid of the normalised entropy h of
    the eigenvalues of the centred, normalised projected tokens: an image of few directions keeps what is attended. The
    process has the cosines of the remaining tokens as its kernel and starts at the one least similar to any salient.

    Differs from the published code: with no salient token the process starts at the first (there at the argmax of a
    diagonal of ones, which rounding decides); where the kernel's rank is used up the most attended fill the budget
    (there tokens are repeated); tokens stay in raster order (``order: published`` hands salient tokens on first, then
    the picks). The published wrapper's own defaults for the share are 0.1 and 0.7; its evaluation sets 0 and 1.

    Attributes:
        mu: entropy at which the share is half way; the published constant is LLaVA-1.5's, as it seems. Measure the mean
            of your model with ``prunetune calibrate``.
        tau: width of the sigmoid; so narrow a one is a switch for models whose entropies lie elsewhere.
        share_min: lowest share of salient tokens.
        share_max: highest share of salient tokens.
        order: "raster" or "published", which needs ``position_policy: compact``.
    """

    mu: float = 0.42
    tau: float = 0.02
    share_min: float = 0.0
    share_max: float = 1.0
    order: str = "raster"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attention"})

    def __post_init__(self) -> None:
        """Check the options."""
        check_share("share_min", self.share_min)
        check_share("share_max", self.share_max)
        check_least("tau", self.tau, 0)
        check_choice("order", self.order, ("raster", "published"))
        if self.share_min > self.share_max:
            raise PruningError(f"share_min is at most share_max, got {self.share_min} and {self.share_max}")

    @property
    def merges(self) -> bool:
        """Whether outputs are copies of tokens in an order of their own."""
        return self.order == "published"

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K), and as notes each item's ``entropy`` and number of ``salient`` tokens."""
        if keep == tokens.count:
            return keep_all(tokens)
        projected = tokens.finite("projected")
        attention = tokens.finite("cls_attention").mean(dim=1)  # (B, N)
        entropy = spectral_entropy(projected)
        salient = self.salient_count(entropy, keep)  # (B,)
        order = top_k(attention, tokens.count)
        is_salient = first_ranked(order, salient)
        # All items take K steps, so that no number is read from the device; picks beyond an item's own do not count.
        picks = _covering(projected, attention, is_salient, keep)
        left = keep - salient
        notes = {"entropy": entropy, "salient": salient}
        if self.order == "raster":
            kept = is_salient | mask_of_picks(picks, left, tokens.count)
            return Selection(positions_of(kept, keep), notes=notes)
        step = torch.arange(keep, device=picks.device)
        # Salient tokens first, by attention, and then the picks.
        from_picks = picks.gather(1, (step - salient[:, None]).clamp(min=0))
        handed_on = torch.where(step < salient[:, None], order[:, :keep], from_picks)
        copied = copies(handed_on, tokens.count, in_order=True)
        return Selection(copied.indices, origin=copied.origin, mixing=copied.mixing, in_order=True, notes=notes)

    def salient_count(
        self,
        entropy: Float[Tensor, " B"],
        keep: int,
    ) -> Int[Tensor, " B"]:
        """Return how many of ``keep`` tokens are kept by attention, (B,), from normalised entropies (B,) float64."""
        height = ((entropy - self.mu) / (self.tau + 1e-12)).clamp(-20, 20)
        share = self.share_min + (self.share_max - self.share_min) * (1 - height.sigmoid())
        return (share * keep).round().long().clamp(0, keep)


def spectral_entropy(features: Float[Tensor, "B N D"]) -> Float[Tensor, " B"]:
    """Return the entropy (B,) of the eigenvalues of the centred unit tokens, over its largest value, float64."""
    unit = F.normalize(features.double(), dim=-1, eps=1e-8)
    centred = unit - unit.mean(dim=1, keepdim=True)
    if centred.shape[1] > centred.shape[2]:  # the smaller of the two Gram matrices, as published
        centred = centred.transpose(1, 2)
    gram = centred @ centred.transpose(1, 2)
    eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=1e-12)
    shares = eigenvalues / eigenvalues.sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(shares).sum(dim=-1)
    return entropy / (math.log(gram.shape[1]) + 1e-12)


def _covering(
    projected: Float[Tensor, "B N D"],
    attention: Float[Tensor, "B N"],
    salient: Bool[Tensor, "B N"],
    keep: int,
) -> Int[Tensor, "B K"]:
    """Return ``keep`` picks (B, K) of the process over the tokens that are not salient."""
    unit = F.normalize(projected, dim=-1, eps=1e-6)
    cosine = unit @ unit.transpose(1, 2)  # (B, N, N)
    to_salient = cosine.masked_fill(~salient[:, None, :], float("-inf")).amax(dim=-1)  # (B, N); -inf without any
    first = to_salient.masked_fill(salient, float("inf")).argmin(dim=-1)  # (B,)
    items = torch.arange(len(first), device=first.device)
    # The first pick conditions the kernel; the others are those of the process on what it leaves.
    own = cosine[items, first, first][:, None]  # (B, 1)
    row = cosine[items, first] / own.clamp(min=1e-8).sqrt()  # (B, N)
    left = cosine - row[:, :, None] * row[:, None, :]
    blocked = salient.clone()
    blocked[items, first] = True
    quality = torch.ones_like(attention)
    rest = pick_determinantal(left, quality, keep - 1, blocked, rank_by=attention)
    return torch.cat([first[:, None], rest], dim=1)
