"""Leaving out the vision layers behind the last one that anything reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from prunetune.pruning import PrunedModel
from prunetune.pruning.families.tower import tower_of
from prunetune.pruning.hooks import stood_in
from prunetune.pruning.signals import of_source


def unread_layers(pruned: PrunedModel) -> list[nn.Module]:
    """Return the vision layers whose output neither the projector nor the pruner reads; none where nobody knows."""
    config: Any = pruned.model.config
    # Of a family from outside, and of features of several layers, nobody knows here what is read.
    if not hasattr(pruned.model.base_model, "vision_tower") or not hasattr(config, "vision_feature_select_strategy"):
        return []
    needs = pruned.needs
    if not isinstance(config.vision_feature_layer, int) or of_source(needs, "head"):
        return []
    tower = tower_of(pruned.model)
    if not tower.known:
        return []
    read = [tower.index_of(need) for need in of_source(needs, "attention", "reader", "output")]
    return list(tower.layers)[max([tower.feature, *read]) + 1 :]


@contextmanager
def stopped(layers: list[nn.Module]) -> Iterator[None]:
    """While open, these layers hand on what they get: hidden states keep their numbers, counted from either end."""
    with ExitStack() as undo:
        for layer in layers:
            undo.enter_context(stood_in(layer, _handed_on))
        yield


def _handed_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states
