"""SparseVLM and SparseVLM+: text that looks at the image rates its tokens; some of what is dropped is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunetune.pruning.budget import Budget
from prunetune.pruning.options import check_choice, check_least
from prunetune.pruning.stages.base import Choice, Heard, Merged, Stage, best, heard, over_rows, ranked
from prunetune.pruning.stages.registry import register_stage


@register_stage("sparsevlm", paper="SparseVLM, arXiv 2410.04417")
@dataclass(frozen=True)
class SparseVLM(Stage):
    """Keep the visual tokens that raters attend to most in the layer below the boundary; merge the best of the rest.

    Raters are found once, on what enters the LLM: text behind the image whose share of the visual tokens' softmax over
    that text is above the mean. Of d dropped tokens the ``int(0.3 d) + 1`` best are put into clusters by density peaks,
    and each cluster's mean stands behind the kept tokens, to compete at the next boundary; what stays is numbered anew.
    The layer l of the paper is the one below the boundary l + 1. The published budgets at 576 tokens are 300, 200, 110
    for 192; 303, 110, 36 for 128; 238, 48, 26 for 96; 66, 30, 17 for 64.

    Version 2 (SparseVLM+) merges nothing and keeps positions. Attention is divided by what queries and keys of ones
    alone would score at that distance, and counted in the half of the heads that give visual tokens most (the code
    has 14, whatever there are). Its budgets are 300, 200, 118; 238, 108, 60; 246, 54, 28; 66, 34, 20.

    Differs from the published code: densities get no random noise, and of equal ones the lower index counts as denser
    (the noise decides there); a budget of all tokens keeps all (there at least one is dropped); raters are of the
    prompt alone in training, and stages run there (published ones are skipped); any batch and padding.

    Attributes:
        version: 1 or 2.
        recycle: whether version 1 merges what it drops.
        heads: how many heads version 2 counts; None is half of them.
    """

    version: int = 1
    recycle: bool = True
    heads: int | None = None

    boundaries: ClassVar[tuple[int, ...]] = (3, 7, 16)
    keeps: ClassVar[tuple[Budget, ...]] = (300, 200, 110)
    queries: ClassVar[str] = "raters"

    def __post_init__(self) -> None:
        check_choice("version", self.version, (1, 2))
        if self.heads is not None:
            check_least("heads", self.heads, 1)

    @property
    def wants(self) -> frozenset[str]:
        """What is heard with the options as they are."""
        if self.version == 2:
            return frozenset({"attention", "unit_scores"})
        return frozenset({"attention", "states"}) if self.recycle else frozenset({"attention"})

    @property
    def merges(self) -> bool:
        """Whether tokens are made of dropped ones."""
        return self.version == 1 and self.recycle

    @property
    def dense(self) -> bool:
        """Whether what stays is numbered anew."""
        return self.version == 1

    def after(self, entering: int, keep: int) -> int:
        """Return how many tokens there are when ``keep`` of ``entering`` are kept, merged ones included."""
        if not self.merges or keep >= entering:
            return min(keep, entering)
        return keep + _clusters(_recycled(entering - keep))

    def raters(
        self, embeddings: Float[Tensor, "B L D"], visual: Bool[Tensor, "B L"], question: Bool[Tensor, "B L"]
    ) -> Bool[Tensor, "B L"]:
        """Return the text tokens that take more than the mean of the visual tokens' softmax over the text."""
        most = torch.stack([visual.sum(dim=1), question.sum(dim=1)], dim=1).amax(dim=0).tolist()
        tokens, images = _columns_of(visual, most[0])
        words, texts = _columns_of(question, most[1])
        scores = _at(embeddings, tokens) @ _at(embeddings, words).transpose(1, 2)  # (B, V, T)
        scores = scores.masked_fill(~texts[:, None, :], float("-inf"))
        scores = scores.masked_fill(~texts.any(dim=1)[:, None, None], 0.0)  # a row without text would be NaN
        taken = over_rows(scores.softmax(dim=2), images) * texts  # (B, T)
        shares = torch.zeros_like(embeddings[:, :, 0]).scatter(1, words, taken)  # (B, L)
        mean = shares.sum(dim=1, keepdim=True) / question.sum(dim=1, keepdim=True).clamp(min=1)
        return (shares > mean) & question

    def choose(self, at: Heard, keep: Sequence[int]) -> Choice:
        """Return the best rated visual slots, and what is merged of the others."""
        attention, rows = heard(at.attention, "attention"), heard(at.rows, "rows")
        if self.version == 2:
            score = _unbiased(attention, heard(at.unit_scores, "unit_scores"), rows, at.visual, self.heads)
        else:
            score = over_rows(attention.mean(dim=1), rows)
        kept = best(score, at.visual, keep)
        if not self.merges:
            return Choice(kept)
        there = at.counts or at.visual.sum(dim=1).tolist()
        dropped = [count - min(count, own) for count, own in zip(there, keep, strict=True)]
        return Choice(kept, _merged(score, at.visual & ~kept, dropped, heard(at.states, "states")))


def _at(values: Float[Tensor, "B L D"], columns: Int[Tensor, "B m"]) -> Float[Tensor, "B m D"]:
    return values.gather(1, columns[:, :, None].expand(-1, -1, values.shape[2]))


def _columns_of(which: Bool[Tensor, "B L"], most: int) -> tuple[Int[Tensor, "B m"], Bool[Tensor, "B m"]]:
    """Return the columns of what there is, at most ``most`` in a row, and which of these there are."""
    columns = torch.sort((~which).long(), dim=1, stable=True).indices[:, :most]
    return columns, which.gather(1, columns)


def _recycled(dropped: int) -> int:
    """Return how many of the dropped tokens are merged."""
    return int(dropped * 0.3) + 1


def _clusters(recycled: int) -> int:
    """Return how many tokens are made of them."""
    return int(recycled / 10) + 1


def _unbiased(
    attention: Float[Tensor, "B H Q n"],
    unit_scores: Float[Tensor, "B Q n"],
    rows: Bool[Tensor, "B Q"],
    visual: Bool[Tensor, "B n"],
    heads: int | None,
) -> Float[Tensor, "B n"]:
    """Return the mean over raters and the stronger half of the heads of attention without what distance makes of it."""
    there = (rows[:, None, :, None] & visual[:, None, None, :]).to(attention)
    divided = attention / unit_scores[:, None] * there
    heads = max(1, attention.shape[1] // 2) if heads is None else min(heads, attention.shape[1])
    strength = divided.sum(dim=(2, 3))  # (B, H)
    strongest = torch.sort(strength, dim=1, descending=True, stable=True).indices[:, :heads]
    picked = divided.gather(1, strongest[:, :, None, None].expand(-1, -1, *divided.shape[2:]))
    return over_rows(picked.mean(dim=1), rows)


def _merged(
    score: Float[Tensor, "B n"], dropped: Bool[Tensor, "B n"], lost: Sequence[int], states: Float[Tensor, "B n D"]
) -> Merged:
    """Return clusters of the best dropped tokens of each row, which lost so many."""
    order = ranked(score, dropped)
    numbers = [_recycled(number) if number else 0 for number in lost]
    counts = [_clusters(number) if number else 0 for number in numbers]
    most = max([*counts, 1])
    mixing = states.new_zeros(len(score), most, score.shape[1])
    centres = torch.zeros(len(score), most, dtype=torch.long, device=score.device)
    # Row by row: each has as many tokens as it dropped.
    for row, (number, count) in enumerate(zip(numbers, counts, strict=True)):
        if number:
            slots = order[row, :number]
            own, belongs = clustered(states[row, slots], count)
            centres[row, :count] = slots[own]
            sizes = torch.zeros(count, device=score.device).index_add(0, belongs, torch.ones_like(slots).float())
            mixing[row, belongs, slots] = 1 / (sizes[belongs] + 1e-6)
    return Merged(mixing, centres, counts)


def clustered(states: Float[Tensor, "r D"], count: int) -> tuple[Int[Tensor, " c"], Int[Tensor, " r"]]:
    """Return the centres of density peaks, by rank, and the cluster of each token.

    A token's density is exp(-mean squared distance to its ``count`` nearest, itself among them). Centres have the
    largest product of density and distance to the nearest denser token, the largest distance if none is denser.

    Args:
        states: of r tokens.
        count: c, how many clusters there are.
    """
    # By differences: a product of matrices is not symmetric to the last bit, and equal densities would not tie.
    distance = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist") / states.shape[1] ** 0.5
    nearest = torch.sort(distance, dim=1).values[:, :count]
    density = (-(nearest**2).mean(dim=1)).exp()
    place = torch.arange(len(density), device=density.device)
    # Of equal densities the lower index is the denser: mutual nearest neighbours tie exactly.
    denser = density[None, :] > density[:, None]
    denser |= (density[None, :] == density[:, None]) & (place[None, :] < place[:, None])
    apart = torch.where(denser, distance, distance.max()).amin(dim=1)
    centres = torch.sort(density * apart, descending=True, stable=True).indices[:count]
    belongs = distance[centres].argmin(dim=0)
    belongs[centres] = torch.arange(count, device=belongs.device)
    return centres, belongs
