"""Which tokens a method merged into which: asked of the method itself, by features that say where they come from.

A method that merges hands over features, and not what it made them of. So it is asked a second time, with a further
channel for each token that is zero in all the others: in what it hands over, these channels hold how much of each token
is in it. They are so small that no distance, norm or product of features changes in float32, and if it kept other
tokens all the same, nothing is said of what was merged.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prunetune.pruning import PrunedModel
from prunetune.pruning.signals import signal_of
from prunetune.pruning.types import Pruner, Selection, VisualTokens

_SMALL = 1e-5
"""Of a further channel, against the length of a feature: its square is lost in a sum of squares."""


@dataclass(frozen=True)
class TracedSelection(Selection):
    """A selection that knows what each output token was made of.

    Attributes:
        shares: how much of each token (K_b, N) each output is made of, one per item, in output order; None where
            nothing was merged, or the method kept other tokens when it was asked again.
    """

    shares: list[Tensor] | None = None

    def rows(self, rows: Sequence[int]) -> TracedSelection:
        """Return what is kept of some of the items, in the order of ``rows``."""
        own = super().rows(rows)
        assert isinstance(own, TracedSelection)  # replace() gives the kind that it was given
        if own is self or self.shares is None:
            return own
        return replace(own, shares=[self.shares[row] for row in rows])


class Traced:
    """A pruner that says what it merged, and is the pruner otherwise.

    Args:
        pruner: the method.
        merges: whether it may return merged features.
    """

    def __init__(self, pruner: Pruner, merges: bool) -> None:
        self.pruner = pruner
        self._asks = merges

    @property
    def needs(self) -> frozenset[str]:
        """Signals to compute."""
        return self.pruner.needs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pruner, name)

    def __call__(self, tokens: VisualTokens, keep: int) -> TracedSelection:
        """Choose, and say what was merged."""
        selection = self.pruner(tokens, keep)
        fields = {name: getattr(selection, name) for name in Selection.__dataclass_fields__}
        return TracedSelection(**fields, shares=self._shares(tokens, keep, selection))

    def _shares(self, tokens: VisualTokens, keep: int, selection: Selection) -> list[Tensor] | None:
        if selection.mixing is not None:
            return selection.mixing
        if selection.merged is None or not self._asks:
            return None
        copies = _copies(tokens, selection)
        if copies is not None:
            return copies
        width = tokens.features.shape[-1]
        marked, size = _marked(tokens)
        again = self.pruner(marked, keep)
        if again.merged is None or not _same(selection, again):
            return None
        return [merged[:, width:].float() / size for merged in again.merged]


def traced(pruned: PrunedModel) -> PrunedModel:
    """Return the same pruned model, whose selections say what was merged."""
    own = copy.copy(pruned)
    own.pruner = Traced(pruned.pruner, pruned.merges)
    return own


def _copies(tokens: VisualTokens, selection: Selection) -> list[Tensor] | None:
    """Return the shares of outputs that are tokens as they were, or none of them, such as [CLS]; None if one is not."""
    if selection.merged is None or selection.origin is None:
        return None
    found = []
    for features, merged, origin in zip(tokens.features, selection.merged, selection.origin, strict=True):
        own = origin >= 0
        if not torch.equal(merged[own], features[origin[own]].to(merged.dtype)):
            return None
        shares = torch.zeros(len(origin), len(features), device=features.device)
        shares[own.nonzero()[:, 0], origin[own]] = 1.0
        # What was made around none of them may be a mean of them: only what holds nothing else is a copy.
        if bool((~own).any()) and not _is_feature_of_all(tokens, merged[~own]):
            return None
        found.append(shares)
    return found


def _is_feature_of_all(tokens: VisualTokens, outputs: Tensor) -> bool:
    """Return whether every one of some outputs (K, C) is a feature of an item as a whole, such as [CLS]'s."""
    for name, values in tokens.signals.items():
        if signal_of(name).axes == "B C" and values.shape[-1] == outputs.shape[-1]:
            known = values.to(outputs.dtype)
            if bool((outputs[:, None] == known[None]).all(dim=-1).any(dim=1).all()):
                return True
    return False


def _marked(tokens: VisualTokens) -> tuple[VisualTokens, float]:
    """Return tokens with a further channel for each, and what a token has in its own."""
    features = tokens.features.float()
    items, count, width = features.shape
    size = _SMALL * float(features.norm(dim=-1).median().clamp(min=1e-6))
    own = torch.eye(count, device=features.device).expand(items, -1, -1) * size
    signals = {}
    for name, values in tokens.signals.items():
        # A feature of the item as a whole, such as [CLS]'s, stands beside the tokens' among what is handed over.
        if signal_of(name).axes == "B C" and values.shape[-1] == width:
            values = torch.cat([values.float(), values.new_zeros(*values.shape[:-1], count, dtype=torch.float32)], -1)
        signals[name] = values
    return replace(tokens, features=torch.cat([features, own], dim=-1), signals=signals), size


def _same(one: Selection, other: Selection) -> bool:
    """Return whether two selections keep the same tokens, in the same places."""
    return all(
        torch.equal(one.of(item), other.of(item)) and torch.equal(one.slots_of(item), other.slots_of(item))
        for item in range(len(one.indices))
    )
