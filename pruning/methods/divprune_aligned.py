"""DivPrune on the text-aligned tokens: the variant that TrimTokenator's paper calls DivPrune*."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunetune.pruning.methods.divprune import most_distant
from prunetune.pruning.methods.trimtokenator import ALIGNMENTS, aligned_tokens
from prunetune.pruning.ops.indexing import ascending, mask_of
from prunetune.pruning.options import check_choice, check_share, whole
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens


@register_pruner("divprune_aligned", paper="DivPrune* of TrimTokenator", exact=False)
@dataclass(frozen=True)
class DivPruneAligned:
    """Filter by alignment with the instruction as TrimTokenator's stage 1 does, then pick by DivPrune.

    A reconstruction: no code was published, and the paper leaves the share that the filter keeps to its own stage 1.

    Attributes:
        n1_ratio: share of tokens that the filter keeps (paper: 0.8); never fewer than K.
        alignment_metric: "l2" (equation 3), "cosine" or "mutual_information" (slow).
    """

    n1_ratio: float = 0.8
    alignment_metric: str = "l2"
    needs: ClassVar[frozenset[str]] = frozenset({"text_token_embeds"})

    def __post_init__(self) -> None:
        """Check the options."""
        check_share("n1_ratio", self.n1_ratio)
        check_choice("alignment_metric", self.alignment_metric, ALIGNMENTS)

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K aligned and mutually distant positions (B, K)."""
        projected = tokens.finite("projected")
        first = max(whole(self.n1_ratio * tokens.count), keep)  # a filter below K would leave fewer than K
        aligned = aligned_tokens(tokens, projected, first, self.alignment_metric)
        picks = most_distant(projected, keep, among=mask_of(aligned, tokens.count))
        return Selection(ascending(picks))
