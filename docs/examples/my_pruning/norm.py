"""A pruner of one's own: the K tokens with the largest features."""

from dataclasses import dataclass
from typing import ClassVar

from prunetune.pruning import Selection, VisualTokens, register_pruner
from prunetune.pruning.ops import ascending, top_k


@register_pruner("norm", paper="none, an example")
@dataclass(frozen=True)
class Norm:
    """Keep the K tokens with the largest features."""

    power: float = 2.0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return the K positions (B, K) of largest norm."""
        features = tokens.finite("features")  # (B, N, C), float32, NaN is an error
        return Selection(ascending(top_k(features.norm(p=self.power, dim=-1), keep)))
