"""Visual-token pruning between the vision side and the LLM of stock Hugging Face models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "prunetune.pruning":
    raise ImportError("import prunetune.pruning, not pruning: a second name would load everything twice")

if TYPE_CHECKING:
    from prunetune.pruning.budget import Budget, check_budget, resolve_budget
    from prunetune.pruning.errors import PruningError
    from prunetune.pruning.families import Family, family_of, register_family, registered_families
    from prunetune.pruning.plug import Generated, PrunedModel
    from prunetune.pruning.registry import Method, build_pruner, register_pruner, registered_methods
    from prunetune.pruning.rewrite import Pruned
    from prunetune.pruning.signals import Signal, register_signal, registered_signals
    from prunetune.pruning.spec import PruningSpec
    from prunetune.pruning.types import Pruner, Selection, VisualTokens
    from prunetune.pruning.vision import Vision

# A name is imported when it is first used: options need no torch, and methods no transformers.
_HOMES = {
    "Budget": "budget",
    "Family": "families",
    "Generated": "plug",
    "Method": "registry",
    "Pruned": "rewrite",
    "PrunedModel": "plug",
    "Pruner": "types",
    "PruningError": "errors",
    "PruningSpec": "spec",
    "Selection": "types",
    "Signal": "signals",
    "Vision": "vision",
    "VisualTokens": "types",
    "build_pruner": "registry",
    "check_budget": "budget",
    "family_of": "families",
    "register_family": "families",
    "register_pruner": "registry",
    "register_signal": "signals",
    "registered_families": "families",
    "registered_methods": "registry",
    "registered_signals": "signals",
    "resolve_budget": "budget",
}

__all__ = [
    "Budget",
    "Family",
    "Generated",
    "Method",
    "Pruned",
    "PrunedModel",
    "Pruner",
    "PruningError",
    "PruningSpec",
    "Selection",
    "Signal",
    "Vision",
    "VisualTokens",
    "build_pruner",
    "check_budget",
    "family_of",
    "register_family",
    "register_pruner",
    "register_signal",
    "registered_families",
    "registered_methods",
    "registered_signals",
    "resolve_budget",
]


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module 'prunetune.pruning' has no attribute {name!r}")
    return getattr(importlib.import_module(f"prunetune.pruning.{_HOMES[name]}"), name)
