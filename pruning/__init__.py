"""Visual-token pruning between the vision side and the LLM of stock Hugging Face models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunetune.lazy import importer

if __name__ != "prunetune.pruning":
    raise ImportError("import prunetune.pruning, not pruning: a second name would load everything twice")

if TYPE_CHECKING:
    from prunetune.pruning.budget import Budget as Budget
    from prunetune.pruning.budget import check_budget as check_budget
    from prunetune.pruning.budget import resolve_budget as resolve_budget
    from prunetune.pruning.elastic import ElasticModel as ElasticModel
    from prunetune.pruning.errors import PruningError as PruningError
    from prunetune.pruning.families import Family as Family
    from prunetune.pruning.families import family_of as family_of
    from prunetune.pruning.families import register_family as register_family
    from prunetune.pruning.families import registered_families as registered_families
    from prunetune.pruning.plug import Generated as Generated
    from prunetune.pruning.plug import PrunedModel as PrunedModel
    from prunetune.pruning.registry import Method as Method
    from prunetune.pruning.registry import build_pruner as build_pruner
    from prunetune.pruning.registry import register_pruner as register_pruner
    from prunetune.pruning.registry import registered_methods as registered_methods
    from prunetune.pruning.rewrite import Pruned as Pruned
    from prunetune.pruning.signals import Signal as Signal
    from prunetune.pruning.signals import register_signal as register_signal
    from prunetune.pruning.signals import registered_signals as registered_signals
    from prunetune.pruning.spec import PruningSpec as PruningSpec
    from prunetune.pruning.spec import StageSpec as StageSpec
    from prunetune.pruning.stages.base import Stage as Stage
    from prunetune.pruning.stages.registry import register_stage as register_stage
    from prunetune.pruning.stages.registry import registered_stages as registered_stages
    from prunetune.pruning.types import Pruner as Pruner
    from prunetune.pruning.types import Selection as Selection
    from prunetune.pruning.types import VisualTokens as VisualTokens
    from prunetune.pruning.vision import Vision as Vision

# A name is imported when it is first used: options need no torch, and methods no transformers.
_HOMES = {
    "Budget": "budget",
    "ElasticModel": "elastic",
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
    "Stage": "stages.base",
    "StageSpec": "spec",
    "Vision": "vision",
    "VisualTokens": "types",
    "build_pruner": "registry",
    "check_budget": "budget",
    "family_of": "families",
    "register_family": "families",
    "register_pruner": "registry",
    "register_signal": "signals",
    "register_stage": "stages.registry",
    "registered_families": "families",
    "registered_methods": "registry",
    "registered_signals": "signals",
    "registered_stages": "stages.registry",
    "resolve_budget": "budget",
}

__all__ = list(_HOMES)
__getattr__ = importer(__name__, _HOMES)
