"""FasterVLM: the tokens that [CLS] looks at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunetune.pruning.ops.indexing import ascending, top_k
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens


@register_pruner("fastervlm", paper="FasterVLM, arXiv 2412.01818", golden=True)
@dataclass(frozen=True)
class FasterVLM:
    """Keep the K tokens with the highest [CLS] attention, averaged over the heads of the feature layer.

    Differs from the published code: scores stay in float32 (there float16, where ties are frequent), and ties go to
    the lower index.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"cls_attention"})

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return the K most attended positions (B, K)."""
        attention = tokens.finite("cls_attention").mean(dim=1)  # (B, N)
        return Selection(ascending(top_k(attention, keep)))
