"""DyCoke, stage 1: in every second and third frame of four, the tokens that changed since the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunetune.pruning.ops.clips import by_frame, cosine_in_time
from prunetune.pruning.ops.indexing import first_ranked, positions_of
from prunetune.pruning.ops.output_order import copies
from prunetune.pruning.options import check_choice, check_share
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all


@register_pruner("dycoke", paper="DyCoke, stage 1, arXiv 2411.15024", golden=True, video=True)
@dataclass(frozen=True)
class DyCoke:
    """Keep of every odd frame, and of the third frame of every four, the tokens least similar to an earlier frame.

    Odd frames are compared with the frame before, the third of four with the first; all as they were before pruning.
    The first of four stays whole, so a clip keeps a little more than a quarter at least. An image is a clip of one
    frame and stays whole. Nothing is merged in spite of the stage's name; stage 2 works on the LLM's cache.

    Differs from the published code: with groups "full" the last group of four is pruned like the others, an odd last
    frame is kept and not dropped, and fewer than five frames do not fail; at least one token of each frame is kept;
    kept tokens stay in raster order with their positions (there they are numbered anew, and handed on frame by frame,
    in pruned frames the least similar first; ``order: published`` hands them on so).

    Attributes:
        merge_ratio: the published share k to drop of the frames that are pruned: each keeps int((1 - k) * L), and the
            budget is not used. None deals what the whole frames leave of the budget out evenly.
        groups: "full" or "published".
        order: "raster" or "published", which needs ``position_policy: compact`` and holds a weight for every pair of a
            kept token and a token.
    """

    merge_ratio: float | None = None
    groups: str = "full"
    order: str = "raster"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("groups", self.groups, ("full", "published"))
        check_choice("order", self.order, ("raster", "published"))
        if self.merge_ratio is not None:
            check_share("merge_ratio", self.merge_ratio)

    @property
    def merges(self) -> bool:
        """Whether outputs are copies of tokens in an order of their own."""
        return self.order == "published"

    def compared(self, frames: int) -> dict[int, int]:
        """Return the frames that are pruned, and the frame that each is compared with.

        Of 6 frames it is ``{1: 0, 2: 0, 3: 2, 5: 4}`` with groups "full".
        """
        pruned = {}
        for frame in range(frames):
            if frame % 2 == 1:
                pruned[frame] = frame - 1
            # The published loop ends before the last group of four.
            elif frame % 4 == 2 and (self.groups == "full" or frame - 2 < frames - 4):
                pruned[frame] = frame - 2
        return pruned

    def frames_left_out(self, frames: int) -> set[int]:
        """Return the frames of which nothing is kept: in the published code an odd last one."""
        left_out = self.groups == "published" and frames % 2 == 1 and frames > 1
        return {frames - 1} if left_out else set()

    def numbers(self, frames: int, per_frame: int, keep: int) -> list[int]:
        """Return how many tokens each frame keeps.

        Of 3 frames with 4 tokens and a budget of 7 they are ``[4, 1, 2]``.
        """
        pruned = sorted(self.compared(frames).keys() - self.frames_left_out(frames))
        whole = frames - len(pruned) - len(self.frames_left_out(frames))
        numbers = [per_frame] * frames
        for frame in self.frames_left_out(frames):
            numbers[frame] = 0
        rest = keep - whole * per_frame
        for place, frame in enumerate(pruned):
            if self.merge_ratio is not None:
                own = int((1 - self.merge_ratio) * per_frame)
            else:
                own = rest * (place + 1) // len(pruned) - rest * place // len(pruned)
            numbers[frame] = min(max(own, 1), per_frame)
        return numbers

    def least(self, frames: int, per_frame: int) -> int:
        """Return how many tokens a clip keeps at least."""
        return sum(self.numbers(frames, per_frame, 0))

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K), or as many as the whole frames and one of each other frame are.

        With ``order: published`` the selection also says where each output comes from.
        """
        if keep == tokens.count and self.merge_ratio is None:
            return keep_all(tokens)
        if self.merge_ratio is None:
            keep = max(keep, self.least(tokens.frames, tokens.per_frame))
        numbers = self.numbers(tokens.frames, tokens.per_frame, keep)
        order = self.similarity(tokens).sort(dim=-1, stable=True).indices  # (B, F, L), least similar first
        if self.order == "published":
            return copies(in_published_order(order, numbers), tokens.count, in_order=True)
        each = torch.tensor(numbers, device=order.device).expand(len(order), -1)  # (B, F)
        kept = first_ranked(order.flatten(0, 1), each.flatten()).view(len(order), -1)  # (B, N)
        return Selection(positions_of(kept, sum(numbers)))

    def similarity(self, tokens: VisualTokens) -> Float[Tensor, "B F L"]:
        """Return the cosine of each token with its place in the frame it is compared with; 0 in whole frames."""
        features = by_frame(tokens.finite("projected"), tokens.frames)  # (B, F, L, D)
        compared = self.compared(tokens.frames)
        found = features.new_zeros(features.shape[:3])
        if compared:
            found[:, list(compared)] = cosine_in_time(features, list(compared), list(compared.values()))
        return found


def in_published_order(order: Int[Tensor, "B F L"], numbers: Sequence[int]) -> Int[Tensor, "B K"]:
    """Return the first ``numbers`` of each frame's ``order``, frame by frame, counted through the clip.

    The orders ``[[[1, 0], [1, 0]]]`` with the numbers ``[2, 1]`` give ``[[1, 0, 3]]``.
    """
    per_frame = order.shape[-1]
    kept = []
    for frame, number in enumerate(numbers):
        kept.append(order[:, frame, :number] + frame * per_frame)
    return torch.cat(kept, dim=1)
