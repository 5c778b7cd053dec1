"""CDPruner: a determinantal point process whose quality is CLIP's view of the instruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prunetune.pruning.fitting import Choice
from prunetune.pruning.ops.greedy import pick_determinantal
from prunetune.pruning.ops.indexing import ascending
from prunetune.pruning.ops.relevance import instruction_relevance
from prunetune.pruning.ops.similarity import cosine_similarity
from prunetune.pruning.ops.statistics import image_range
from prunetune.pruning.options import check_choice
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens


@register_pruner(
    "cdpruner",
    paper="CDPruner, arXiv 2506.10967",
    golden=True,
    fits=[Choice("relevance_sign", values=(-1, 1))],
)
@dataclass(frozen=True)
class CDPruner:
    """Greedy MAP of the kernel ``diag(r) S diag(r)``: S the cosine of projected features, r the relevance.

    Relevance is *minus* the cosine of a token and the instruction in CLIP's space, scaled to [0, 1] + eps over all
    crops of an image. The minus is the published code's, on purpose: its authors found that CLIP's patch embeddings
    point away from matching text.

    Differs from the published code: where the kernel's rank is used up, or all tokens are equally relevant, the most
    relevant tokens fill the budget (there fewer than K survive); similarities are float32; long instructions are cut
    into pieces that each have a start and an end token.

    Attributes:
        relevance_sign: -1 as published, 1 to prefer tokens similar to the instruction.
        eps: added to the scaled relevance's numerator.
    """

    relevance_sign: int = -1
    eps: float = 1e-6
    needs: ClassVar[frozenset[str]] = frozenset({"image_embeds", "text_embeds"})

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("relevance_sign", self.relevance_sign, (1, -1))

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K), diverse given the instruction."""
        similarity = cosine_similarity(tokens.finite("projected"))  # (B, N, N)
        picks = pick_determinantal(similarity, self.quality(tokens), keep)
        return Selection(ascending(picks))

    def quality(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Return the scaled relevance r (B, N); of equally relevant tokens all are 1."""
        relevance = self.relevance_sign * instruction_relevance(tokens)  # (B, N)
        low, high = image_range(relevance, tokens.image)
        spread = high - low  # (B, 1)
        # Where all are equally relevant the published 0 / 0 leaves fewer than K tokens; 1 leaves the choice to S.
        return torch.where(spread > 0, (relevance - low + self.eps) / spread, 1)
