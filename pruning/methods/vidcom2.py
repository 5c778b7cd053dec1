"""VidCom2: tokens unlike their frame and their video, and more of them from frames that stand out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from prunetune.pruning.ops.clips import FRAMES_AT_ONCE, by_frame, ragged_positions
from prunetune.pruning.ops.indexing import first_ranked
from prunetune.pruning.options import check_choice, check_share
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all

TEMPERATURE = 0.01
WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
"""Of the Gaussian kernels, the squared distance's divisor halved."""


@register_pruner("vidcom2", paper="Video Compression Commander, arXiv 2505.14454", golden=True, video=True)
@dataclass(frozen=True)
class VidCom2:
    """Keep the tokens least like their frame's mean and the video's mean; frames unlike the video keep more.

    Tokens are compared by Gaussian kernels on the half of the channels that varies least. An image is a clip of one
    frame and keeps its budget.

    Differs from the published code: clips of a batch are pruned each on its own (there, batches are not pruned at all);
    a budget of everything changes nothing (there, frames below the mean share lose tokens); of a single channel, that
    one is compared; with count "fixed" a budget below one token per frame is kept, too.

    Attributes:
        count: "fixed" keeps exactly the budget: of too many the most redundant are dropped, of too few the least
            redundant added, as vLLM does; "published" keeps what the frames' rounded shares add up to.
        retention_ratio: the published share r; the count is then r * N ("fixed": vLLM's, at least one token per frame)
            and the budget is not used. None is the budget's share.
    """

    count: str = "fixed"
    retention_ratio: float | None = None
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("count", self.count, ("fixed", "published"))
        if self.retention_ratio is not None:
            check_share("retention_ratio", self.retention_ratio)

    @property
    def servable(self) -> bool:
        """Whether the number of kept tokens is known before the video is encoded."""
        return self.count == "fixed"

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K), or with count "published" (K_b,) of each clip."""
        ratio = keep / tokens.count
        if self.retention_ratio is not None:
            ratio = self.retention_ratio
            # vLLM is called with the share to drop, and 1 - (1 - 0.1) is below 0.1 in doubles.
            keep = min(max(tokens.frames, int(tokens.count * (1 - (1 - ratio)))), tokens.count)
        if ratio == 1 or (self.count == "fixed" and keep == tokens.count):
            return keep_all(tokens)
        to_video, to_frame = likeness(tokens)
        redundancy = to_video + to_frame  # (B, F, L)
        chosen = self.within_frames(to_video, redundancy, ratio).flatten(1)  # (B, N)
        if self.count == "published":
            return Selection(ragged_positions(chosen))
        # Least redundant first, and of those the chosen before the others: the first K are what vLLM comes to.
        order = redundancy.flatten(1).sort(dim=-1, stable=True).indices
        rank = (~chosen.gather(1, order)).long().sort(dim=-1, stable=True).indices
        kept = order.gather(1, rank)[:, :keep]
        return Selection(kept.sort(dim=-1).values)

    def within_frames(
        self, to_video: Float[Tensor, "B F L"], redundancy: Float[Tensor, "B F L"], ratio: float
    ) -> Bool[Tensor, "B F L"]:
        """Return which tokens each frame keeps by its own share, (B, F, L)."""
        count = to_video.shape[-1]
        numbers = (frame_scale(to_video, ratio) * count).round().clamp(min=1, max=count).long()  # (B, F)
        order = redundancy.sort(dim=-1, stable=True).indices  # (B, F, L)
        chosen = first_ranked(order.flatten(0, 1), numbers.flatten())
        return chosen.view_as(redundancy)


def frame_scale(to_video: Float[Tensor, "B F L"], ratio: float) -> Float[Tensor, "B F"]:
    """Return each frame's share of its tokens, (B, F) float64: above ``ratio`` where it is unlike the video."""
    unlike = -to_video.double().mean(dim=-1)  # (B, F)
    weight = (unlike / TEMPERATURE).softmax(dim=-1)
    return (ratio * (1 + weight - 1 / weight.shape[1])).clamp(max=1)


def likeness(tokens: VisualTokens) -> tuple[Float[Tensor, "B F L"], Float[Tensor, "B F L"]]:
    """Return how like each token is to the video's mean and to its frame's mean, (B, F, L) float32, 0 to 5.

    Computed in float64, a few frames at a time, and rounded once: it has the same bits in any batch.
    """
    features = by_frame(tokens.finite("projected"), tokens.frames)  # (B, F, L, D)
    steady = _steady_channels(features)[:, None, None]  # (B, 1, 1, D)
    parts = features.split(FRAMES_AT_ONCE, dim=1)

    def unit(part: Tensor) -> Tensor:
        return F.normalize(part.double() * steady, dim=-1)  # other channels are zero, which changes no distance

    of_frame = torch.cat([unit(part).mean(dim=2) for part in parts], dim=1)  # (B, F, D), not normalised again
    of_video = of_frame.mean(dim=1)[:, None, None]  # (B, 1, 1, D)
    to_video, to_frame = [], []
    for part, means in zip(parts, of_frame.split(FRAMES_AT_ONCE, dim=1), strict=True):
        tokens_of_part = unit(part)
        to_video.append(_kernels((tokens_of_part - of_video).square().sum(dim=-1)))
        to_frame.append(_kernels((tokens_of_part - means[:, :, None]).square().sum(dim=-1)))
    return torch.cat(to_video, dim=1), torch.cat(to_frame, dim=1)


def _steady_channels(features: Float[Tensor, "B F L D"]) -> Float[Tensor, "B D"]:
    """Return 1 for the half of the channels of lowest variance over a clip, and 0 for the others, (B, D) float64."""
    flat = features.flatten(1, 2)  # (B, N, D)
    parts = flat.split(FRAMES_AT_ONCE * features.shape[2], dim=1)
    mean = sum(part.double().sum(dim=1) for part in parts) / flat.shape[1]  # (B, D)
    variance = sum((part.double() - mean[:, None]).square().sum(dim=1) for part in parts) / flat.shape[1]
    order = variance.float().sort(dim=-1, stable=True).indices
    half = order[:, : max(1, order.shape[1] // 2)]
    return torch.zeros_like(mean).scatter(1, half, 1.0)


def _kernels(square: Float[Tensor, "B F L"]) -> Float[Tensor, "B F L"]:
    """Return the sum of Gaussian kernels of squared distances, float32."""
    total = torch.zeros_like(square)
    for width in WIDTHS:
        total += torch.exp(-square / (2 * width))
    return total.float()
