"""Visual-token pruning between the vision side and the LLM of stock Hugging Face models."""

from pruning.budget import Budget, check_budget, resolve_budget
from pruning.families import Family, family_of, registered_families
from pruning.plug import Pruned, PrunedModel, PruningSpec
from pruning.registry import Method, build_pruner, register_pruner, registered_methods
from pruning.types import Pruner, PruningError, Selection, VisualTokens

__all__ = [
    "Budget",
    "Family",
    "Method",
    "Pruned",
    "PrunedModel",
    "Pruner",
    "PruningError",
    "PruningSpec",
    "Selection",
    "VisualTokens",
    "build_pruner",
    "check_budget",
    "family_of",
    "register_pruner",
    "registered_families",
    "registered_methods",
    "resolve_budget",
]
