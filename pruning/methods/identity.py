"""Keep every token: the dense arm, run through the same code as every other arm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunetune.pruning.errors import PruningError
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens, keep_all


@register_pruner("identity", paper="the unpruned model")
@dataclass(frozen=True)
class Identity:
    """Keep all N tokens; the outputs are bit-identical to the stock model's."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return all positions.

        Raises:
            PruningError: if the budget is below N, which this method can't honour.
        """
        # A budget that is not met would be a dense arm under a pruned arm's name.
        if keep != tokens.count:
            raise PruningError(
                f"identity keeps all {tokens.count} visual tokens, the budget says {keep}; "
                'use keep: "100%" or another pruner'
            )
        return keep_all(tokens)
