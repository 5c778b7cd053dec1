"""EVS: the tokens of a video that changed most since the frame before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prunetune.pruning.errors import PruningError
from prunetune.pruning.ops.clips import by_frame, cosine_in_time
from prunetune.pruning.ops.indexing import ascending, top_k
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all

FIRST_FRAME = 255.0
"""The change of the first frame's tokens: above every distance, so that it is kept whole."""


@register_pruner("evs", paper="Efficient Video Sampling, arXiv 2510.14624", golden=True, video=True)
@dataclass(frozen=True)
class EVS:
    """Keep the whole first frame, and of all others the tokens least similar to their place in the frame before.

    Frames are compared with their direct predecessor, kept or not: a cut keeps its whole frame, slow drift is never
    noticed. A clip keeps its budget, but never less than one frame; an image is a clip of one frame and stays whole.

    Differs from the published code: cosines are computed in float64, so that equal tokens are exactly equal, in any
    batch, and the lower index wins; positions, also of the text behind the video, stay those of the full sequence. The
    published code is that of the vLLM engine; the paper's rule on pixels is not this one.

    Attributes:
        prune_rate: the published share to drop, q in [0, 1): max(L, int(F * L * (1 - q))) tokens are kept, and the
            budget is not used. None keeps the budget.
    """

    prune_rate: float | None = None
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Check the options."""
        if self.prune_rate is not None and not 0 <= self.prune_rate < 1:
            raise PruningError(f"prune_rate is a share in [0, 1), got {self.prune_rate}")

    def least(self, frames: int, per_frame: int) -> int:
        """Return how many tokens a clip keeps at least: those of its first frame."""
        return per_frame

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K), or those of the first frame if it has more."""
        if self.prune_rate is not None:
            # The engine's own expression: 80 * (1 - 0.9) is 7.999... in doubles, and 7 tokens.
            keep = int(tokens.count * (1 - self.prune_rate))
        keep = max(keep, tokens.per_frame)
        if keep == tokens.count:
            return keep_all(tokens)
        return Selection(ascending(top_k(change(tokens), keep)))


def change(tokens: VisualTokens) -> Float[Tensor, "B N"]:
    """Return how much each token (B, N) differs from its place in the frame before, 1 - cosine."""
    features = by_frame(tokens.finite("projected"), tokens.frames)  # (B, F, L, D)
    later = range(1, tokens.frames)
    cosine = cosine_in_time(features, later, [frame - 1 for frame in later])  # (B, F - 1, L)
    first = cosine.new_full((len(cosine), 1, tokens.per_frame), FIRST_FRAME)
    return torch.cat([first, 1 - cosine], dim=1).flatten(1)
