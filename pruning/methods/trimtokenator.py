"""TrimTokenator: tokens aligned with the instruction, and of those the least redundant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunetune.pruning.ops.greedy import pick_spread
from prunetune.pruning.ops.indexing import ascending, mask_of, top_k
from prunetune.pruning.ops.mutual_information import mutual_information
from prunetune.pruning.ops.similarity import cosine_similarity, euclidean_distance
from prunetune.pruning.ops.statistics import masked_mean, text_mask
from prunetune.pruning.options import check_choice, check_share, whole
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens

METRICS = ("l2", "cosine")
ALIGNMENTS = (*METRICS, "mutual_information")
STAGES = ("align_repmax", "repmax_align", "align", "repmax")


@register_pruner("trimtokenator", paper="TrimTokenator", exact=False)
@dataclass(frozen=True)
class TrimTokenator:
    """Cross-modal filtering (equations 3-4), then greedy representational maximisation, RepMax (equations 8-16).

    A token's alignment is minus its mean L2 distance to the token embeddings of the instruction. Of the N1 best
    aligned, RepMax starts at the one with the lowest mean similarity (itself included) and adds the token with the
    lowest mean similarity to everything chosen.

    A reconstruction: no code was published, and the paper does not say which text tokens count (here the instruction's,
    without template or answer), what happens if K exceeds N1 (here N1 is K), or over which samples it estimates the
    mutual information of two tokens in table 9 (here their channels). With stages "repmax_align" (its ablation 1)
    RepMax reduces to N1 tokens first.

    Attributes:
        n1_ratio: N1 / N, rounded down (paper: 0.8; table 11 has 0.7 to 0.9).
        alignment_metric: "l2", "cosine" or "mutual_information" (table 9); the last takes minutes for an image of
            576 tokens on a CPU.
        redundancy_metric: "cosine" or "l2" (table 10).
        stages: "align_repmax", or the ablations of table 6: "repmax_align", "align" alone, "repmax" alone.
    """

    n1_ratio: float = 0.8
    alignment_metric: str = "l2"
    redundancy_metric: str = "cosine"
    stages: str = "align_repmax"
    needs: ClassVar[frozenset[str]] = frozenset({"text_token_embeds"})

    def __post_init__(self) -> None:
        """Check the options."""
        check_share("n1_ratio", self.n1_ratio)
        check_choice("alignment_metric", self.alignment_metric, ALIGNMENTS)
        check_choice("redundancy_metric", self.redundancy_metric, METRICS)
        check_choice("stages", self.stages, STAGES)

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K), aligned and not redundant."""
        first = max(whole(self.n1_ratio * tokens.count), keep)
        projected = tokens.finite("projected")  # (B, N, D)
        if self.stages == "align":
            return Selection(aligned_tokens(tokens, projected, keep, self.alignment_metric))
        if self.stages == "repmax":
            return Selection(ascending(repmax(projected, keep, self.redundancy_metric)))
        if self.stages == "repmax_align":
            # Ascending, so that of equally aligned tokens the lower index wins.
            spread = ascending(repmax(projected, first, self.redundancy_metric))
            scores = alignment(tokens, projected, self.alignment_metric).gather(1, spread)
            best = spread.gather(1, top_k(scores, keep))
            return Selection(ascending(best))
        aligned = aligned_tokens(tokens, projected, first, self.alignment_metric)
        picks = repmax(projected, keep, self.redundancy_metric, among=mask_of(aligned, tokens.count))
        return Selection(ascending(picks))


def alignment(
    tokens: VisualTokens,
    projected: Float[Tensor, "B N D"],
    metric: str,
) -> Float[Tensor, "B N"]:
    """Return how well each projected token is aligned with the instruction's token embeddings, (B, N), equation 3."""
    words = tokens.finite("text_token_embeds")  # (B, M, D)
    if metric == "cosine":
        return masked_mean(cosine_similarity(projected, words), text_mask(words))
    if metric == "mutual_information":  # equation 2, which equation 3 approximates
        return masked_mean(mutual_information(projected, words), text_mask(words))
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b: one product instead of N * M differences of width D.
    of_tokens = torch.linalg.vector_norm(projected, dim=-1).square()  # (B, N)
    of_words = words.square().sum(dim=-1)  # (B, M)
    square = of_tokens[..., None] + of_words[:, None]
    product = projected @ words.transpose(1, 2)  # (B, N, M)
    distance = (square - 2 * product).clamp(min=0).sqrt()
    return -masked_mean(distance, text_mask(words))


def aligned_tokens(
    tokens: VisualTokens,
    projected: Float[Tensor, "B N D"],
    count: int,
    metric: str,
) -> Int[Tensor, "B N1"]:
    """Return the ``count`` best aligned positions (B, N1), ascending, equation 4."""
    return ascending(top_k(alignment(tokens, projected, metric), count))


def repmax(
    features: Float[Tensor, "B N D"],
    keep: int,
    metric: str,
    among: Bool[Tensor, "B N"] | None = None,
) -> Int[Tensor, "B K"]:
    """Return ``keep`` positions (B, K) of ``features`` (B, N, D) with low mutual similarity, in order of picking.

    With "l2" the similarity is minus the distance. With ``among`` (B, N), boolean, only those tokens exist.
    """
    if metric == "l2":
        apart, _ = euclidean_distance(features)
    else:
        # The highest sum of these is the lowest sum of similarities, which equation 16 asks for.
        apart = cosine_similarity(features).neg_()
    if among is None:
        exist = torch.ones(apart.shape[:2], device=apart.device)
    else:
        exist = among.float()
    total = (apart @ exist[..., None])[..., 0]  # (B, N)
    mean = total / exist.sum(dim=1, keepdim=True)  # equation 9
    taken = exist == 0
    first = mean.masked_fill(taken, float("-inf")).argmax(dim=-1)  # equation 10
    items = torch.arange(len(first), device=first.device)
    taken[items, first] = True
    # The mean over the chosen (equation 13) ranks as the sum does (equation 16).
    rest = pick_spread(apart, apart[items, first], keep - 1, "add", taken)
    return torch.cat([first[:, None], rest], dim=1)
