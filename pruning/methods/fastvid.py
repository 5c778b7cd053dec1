"""FastVID: segments of like frames; salient tokens of each frame, and density peaks that merge their segment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunetune.pruning.ops.clips import by_frame, ragged_positions
from prunetune.pruning.ops.indexing import first_ranked, positions_of, rows_of
from prunetune.pruning.options import check_choice, check_least, check_share
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all

NEIGHBOURS = 4
"""How many of the nearest tokens, itself among them, a token's density is measured by."""


@dataclass(frozen=True)
class Plan:
    """How many tokens each frame of a clip gives.

    Attributes:
        segment: (B, F) the segment of each frame, from 0.
        salient: (B, F) tokens that stay as they are.
        context: (B, F) tokens that others are merged into; 0 but in anchor frames.
        alone: (B, F) whether an anchor merges tokens of its own frame only.
    """

    segment: Int[Tensor, "B F"]
    salient: Int[Tensor, "B F"]
    context: Int[Tensor, "B F"]
    alone: Bool[Tensor, "B F"]


@register_pruner("fastvid", paper="FastVID, arXiv 2503.11187", merges=True, exact=False, golden=True, video=True)
@dataclass(frozen=True)
class FastVID:
    """Cut a clip where frames change; keep each frame's salient tokens, and merge the rest into few anchor frames.

    Anchors are the last frame of a segment and every p-th before it. Their context tokens, peaks of density, each
    become a weighted mean of themselves and of the segment's tokens that are most like them. The mean is taken after
    the projector, so a selection carries its weights and gradients reach the projector through all tokens. An image is
    a clip of one frame.

    Differs from the published code (the form for LLaVA-OneVision): no random noise on densities, equal ones do not
    dominate each other; where an anchor has fewer tokens than context tokens are asked for, the segment's frames keep
    more salient ones instead of failing; a budget of everything changes nothing; any number of frames, clips and tokens
    runs.

    Attributes:
        count: "fixed" keeps exactly the budget: what a segment's equal shares leave over goes to its first anchors one
            each, and the budget's rest over the frames to salient tokens; "published" loses both.
        frames: what frames are compared and tokens are salient by: "received" is the mean of a frame's tokens and the
            attention they receive, as in the authors' form for Qwen2.5-VL (whose further rules are not here);
            "pooling_head" is the vision tower's attention pooling, of SigLIP, as in their form for LLaVA-OneVision.
        retention_ratio: the published share; each frame's budget is then int(L * ratio), and the budget is not used.
            None is the budget.
        segments: the published c: a clip is cut at its c - 1 largest changes at least.
        threshold: the published tau: it is also cut where two frames' cosine is below; None is 0.84 with "received" and
            0.9 with "pooling_head".
        context_ratio: the published d, the share of the budget for context tokens.
        anchor_step: the published p.
        own_weight: the published beta, the least weight of a context token in its mean.
    """

    count: str = "fixed"
    frames: str = "received"
    retention_ratio: float | None = None
    segments: int = 8
    threshold: float | None = None
    context_ratio: float = 0.4
    anchor_step: int = 4
    own_weight: float = 0.6

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("count", self.count, ("fixed", "published"))
        check_choice("frames", self.frames, ("received", "pooling_head"))
        if self.retention_ratio is not None:
            check_share("retention_ratio", self.retention_ratio)
        check_least("segments", self.segments, 1)
        check_share("context_ratio", self.context_ratio)
        check_least("anchor_step", self.anchor_step, 1)
        check_share("own_weight", self.own_weight)

    @property
    def needs(self) -> frozenset[str]:
        """Received attention, or the pooling head's output and attention."""
        return frozenset({"received_attention"} if self.frames == "received" else {"head_feature", "head_attention"})

    @property
    def servable(self) -> bool:
        """Whether the number of kept tokens is known before the video is encoded."""
        return self.count == "fixed"

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions of each clip, and how all its projected tokens are mixed there, (K, N)."""
        if self.retention_ratio is not None:
            keep = tokens.frames * max(1, int(tokens.per_frame * self.retention_ratio))
        if keep == tokens.count:
            return keep_all(tokens)
        plan, salient, context = self.chosen(tokens, keep)
        compared = by_frame(tokens.finite("projected"), tokens.frames)  # (B, F, L, D)
        most = min(tokens.per_frame, self._most_context(keep // tokens.frames))
        kept = (salient | context).flatten(1)  # (B, N)
        if self.count == "fixed":
            indices = positions_of(kept, keep)
            weights = mixing_weights(compared, context, salient, plan, self.own_weight, most, keep)
            return Selection(indices, origin=list(indices), mixing=list(weights))
        ragged = ragged_positions(kept)
        longest = max(len(at) for at in ragged)
        weights = mixing_weights(compared, context, salient, plan, self.own_weight, most, longest)
        mixing = [own[: len(at)] for own, at in zip(weights, ragged, strict=True)]
        return Selection(ragged, origin=ragged, mixing=mixing)

    def chosen(self, tokens: VisualTokens, keep: int) -> tuple[Plan, Bool[Tensor, "B F L"], Bool[Tensor, "B F L"]]:
        """Return the plan of each clip, its salient tokens and its context tokens, (B, F, L) each."""
        features = by_frame(tokens.finite("projected"), tokens.frames)  # (B, F, L, D)
        frame, saliency = self.frame_signals(tokens, features)
        plan = self.plan(cuts(frame, self.segments, self._threshold()), tokens.per_frame, keep)
        salient = _best(saliency, plan.salient)
        context = _best(density_scores(features, ~salient), plan.context)
        return plan, salient, context

    def frame_signals(
        self, tokens: VisualTokens, features: Float[Tensor, "B F L D"]
    ) -> tuple[Float[Tensor, "B F E"], Float[Tensor, "B F L"]]:
        """Return a vector of each frame (B, F, E), and how salient its tokens are (B, F, L)."""
        if self.frames == "received":
            attention = tokens.finite("received_attention").mean(dim=1)  # (B, N)
            return features.double().mean(dim=2).float(), by_frame(attention, tokens.frames)
        frame = tokens.finite("head_feature")  # (B, F, E), and of images (B, E)
        return frame.view(len(frame), tokens.frames, -1), by_frame(tokens.finite("head_attention"), tokens.frames)

    def plan(self, cut: Bool[Tensor, "B G"], per_frame: int, keep: int) -> Plan:
        """Return how many tokens each frame gives.

        Args:
            cut: (B, F - 1) whether a segment ends with each frame but the last.
            per_frame: L.
            keep: K of the clip.
        """
        batch, frames = len(cut), cut.shape[1] + 1
        device = cut.device
        time = torch.arange(frames, device=device).expand(batch, -1)
        segment = F.pad(cut.long().cumsum(dim=1), (1, 0))  # (B, F)
        ends = F.pad(cut, (0, 1), value=True)
        # The end of a frame's segment is the first end from there on.
        end = torch.where(ends, time, frames).flip(1).cummin(dim=1).values.flip(1)
        starts = F.pad(cut, (1, 0), value=True)
        start = torch.where(starts, time, -1).cummax(dim=1).values
        length = end - start + 1
        from_end = end - time
        anchor = from_end % self.anchor_step == 0
        anchors = (length + self.anchor_step - 1) // self.anchor_step

        budget = keep // frames
        shared = int(budget * self.context_ratio)  # context tokens per frame of a segment
        share = shared * length // anchors
        alone = share == shared
        context = torch.where(anchor, share, 0)
        salient = torch.full_like(context, budget - shared)
        if self.count == "fixed":
            before = (length - 1) // self.anchor_step - from_end // self.anchor_step  # anchors of the segment before it
            left = shared * length % anchors
            context = context + (anchor & (before < left)).long()
            rest = keep % frames
            salient = salient + (time + 1) * rest // frames - time * rest // frames
        # An anchor that has too few tokens gives all, and the frames of its segment make up for it in order of time.
        wanted = context
        context = torch.minimum(wanted, per_frame - salient)
        room = per_frame - salient - context
        lacking = _of_segment(wanted - context, segment)
        taken_before = _before_in_segment(room, segment)
        salient = salient + torch.minimum((lacking - taken_before).clamp(min=0), room)
        return Plan(segment, salient, context, alone)

    def _threshold(self) -> float:
        if self.threshold is not None:
            return self.threshold
        return 0.84 if self.frames == "received" else 0.9

    def _most_context(self, budget: int) -> int:
        """Return how many context tokens an anchor has at most: the shares of as many frames as it stands for."""
        return int(budget * self.context_ratio) * self.anchor_step + 1


def _best(scores: Float[Tensor, "B F L"], numbers: Int[Tensor, "B F"]) -> Bool[Tensor, "B F L"]:
    """Return a mask (B, F, L) of the highest scores of each frame, as many as ``numbers`` (B, F) says."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return first_ranked(order.flatten(0, 1), numbers.flatten()).view(scores.shape)


def _of_segment(values: Int[Tensor, "B F"], segment: Int[Tensor, "B F"]) -> Int[Tensor, "B F"]:
    """Return for each frame the sum of ``values`` (B, F) over its segment."""
    return torch.zeros_like(values).scatter_add(1, segment, values).gather(1, segment)


def _before_in_segment(values: Int[Tensor, "B F"], segment: Int[Tensor, "B F"]) -> Int[Tensor, "B F"]:
    """Return for each frame the sum of ``values`` (B, F) over the earlier frames of its segment.

    Values ``[[1, 2, 3]]`` in segments ``[[0, 0, 1]]`` give ``[[0, 1, 0]]``.
    """
    running = values.cumsum(dim=1)
    totals = torch.zeros_like(values).scatter_add(1, segment, values)
    earlier_segments = (totals.cumsum(dim=1) - totals).gather(1, segment)
    return running - values - earlier_segments


def cuts(frame: Float[Tensor, "B F E"], segments: int, threshold: float) -> Bool[Tensor, "B G"]:
    """Return where a clip is cut, (B, F - 1): after frame t if it is least like the next, or less than the threshold.

    Args:
        frame: (B, F, E) a vector of each frame.
        segments: how many segments there are at least.
        threshold: cosine below which there is a cut in any case.
    """
    wide = frame.double()
    before, after = wide[:, :-1], wide[:, 1:]
    tiny = torch.finfo(torch.float32).tiny
    norms = (before.norm(dim=-1) * after.norm(dim=-1)).clamp(min=tiny)
    cosine = ((before * after).sum(dim=-1) / norms).float()  # (B, F - 1)
    order = cosine.sort(dim=-1, stable=True).indices
    least = torch.full((len(order),), min(segments, frame.shape[1]) - 1, device=order.device)
    return first_ranked(order, least) | (cosine < threshold)


def density_scores(features: Float[Tensor, "B F L D"], candidates: Bool[Tensor, "B F L"]) -> Float[Tensor, "B F L"]:
    """Return how much of a density peak each candidate is, density times distance to a denser one; others have -1.

    Frame by frame, and in float64 rounded once.
    """
    scores = []
    for frame in range(features.shape[1]):
        scores.append(_peaks(features[:, frame], candidates[:, frame]))
    return torch.stack(scores, dim=1)


def _peaks(features: Float[Tensor, "B L D"], candidates: Bool[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    wide = features.double()
    product = wide @ wide.transpose(1, 2)  # (B, L, L)
    square = product.diagonal(dim1=1, dim2=2)
    distance = (square[:, :, None] + square[:, None, :] - 2 * product).clamp(min=0)
    distance.diagonal(dim1=1, dim2=2).zero_()
    # Duplicates are at no distance: what rounding leaves of their difference is not one.
    scale = torch.maximum(square[:, :, None], square[:, None, :])
    distance = torch.where(distance <= 1e-12 * scale, 0, distance)
    distance = (distance.sqrt() / features.shape[-1] ** 0.5).float()
    others = ~candidates[:, None, :]  # (B, 1, L), columns that do not exist
    near = min(NEIGHBOURS, features.shape[1])
    nearest = distance.masked_fill(others, float("inf")).topk(near, dim=-1, largest=False).values  # (B, L, 4)
    exists = nearest.isfinite()  # a frame may have fewer candidates
    mean = nearest.masked_fill(~exists, 0).square().sum(dim=-1) / exists.sum(dim=-1).clamp(min=1)
    density = torch.exp(-mean)  # (B, L)
    pair = candidates[:, :, None] & candidates[:, None, :]
    largest = distance.masked_fill(~pair, 0).amax(dim=(1, 2))[:, None, None]  # (B, 1, 1)
    denser = (density[:, None, :] > density[:, :, None]) & ~others
    gap = torch.where(denser, distance, largest).amin(dim=-1)  # (B, L)
    return (gap * density).masked_fill(~candidates, -1)


def mixing_weights(
    compared: Float[Tensor, "B F L D"],
    context: Bool[Tensor, "B F L"],
    salient: Bool[Tensor, "B F L"],
    plan: Plan,
    own_weight: float,
    most: int,
    keep: int,
) -> Float[Tensor, "B K N"]:
    """Return the weights (B, K, N) by which each kept token is mixed of all: 1 of itself, or a context token's mean.

    Kept tokens are in raster order; of a clip that keeps fewer than K the last rows mean nothing.

    Args:
        compared: (B, F, L, D) what decides which context token of an anchor a token is averaged into.
        context: (B, F, L) context tokens.
        salient: (B, F, L) tokens that are averaged into none.
        plan: whose tokens go where.
        own_weight: least weight of a context token.
        most: context tokens that an anchor has at most.
        keep: K, the most that a clip keeps.
    """
    batch, frames, per_frame = context.shape
    unit = F.normalize(compared, dim=-1).flatten(1, 2)  # (B, N, D)
    kept = (salient | context).flatten(1)  # (B, N)
    slot = kept.long().cumsum(dim=1) - 1  # (B, N), the row of each kept token
    free = ~salient.flatten(1)  # (B, N)
    of_token = plan.segment.repeat_interleave(per_frame, dim=1, output_size=frames * per_frame)  # (B, N)
    time = torch.arange(frames, device=unit.device).repeat_interleave(per_frame)  # (N,)
    # One more row than there are tokens, for the padding of anchors that have fewer context tokens than others.
    weights = torch.zeros(batch, keep + 1, frames * per_frame, device=unit.device)
    weights[:, :keep].scatter_(2, positions_of(kept, keep)[..., None], 1.0)
    for frame in range(frames):
        # One anchor at a time: the products of all would be F times as large as the tokens.
        at = positions_of(context[:, frame], most)  # (B, q), padded with other tokens
        real = context[:, frame].gather(1, at)  # (B, q)
        rows = at + frame * per_frame
        similarity = unit @ rows_of(unit, rows).transpose(1, 2)  # (B, N, q)
        target = similarity.masked_fill(~real[:, None], float("-inf")).argmax(dim=-1)  # (B, N)
        same_segment = of_token == plan.segment[:, frame, None]
        only_own = plan.alone[:, frame, None] & (time != frame)
        joins = free & same_segment & ~only_own & real.any(dim=1, keepdim=True)
        member = F.one_hot(target, at.shape[1]).transpose(1, 2) * joins[:, None]  # (B, q, N)
        number = member.sum(dim=-1, keepdim=True)  # (B, q, 1)
        own = (1 / (number + 1)).clamp(min=own_weight)
        mean = (1 - own) * member / number.clamp(min=1)  # (B, q, N)
        mean = mean.scatter_add(2, rows[..., None], own)
        into = torch.where(real, slot.gather(1, rows), keep)[..., None]  # (B, q, 1)
        weights.scatter_(1, into.expand_as(mean), mean)
    return weights[:, :keep]
