"""Fine-tuning of vision-language models whose visual tokens are pruned.

The names below are imported when they are first used, so that ``import prunetune`` costs nothing.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunetune.configs import EvaluateConfig, ModelConfig, RecalibrateConfig, load_config
    from prunetune.models import Arm
    from prunetune.pruning import (
        PrunedModel,
        PruningError,
        PruningSpec,
        Selection,
        Signal,
        Vision,
        VisualTokens,
        build_pruner,
        register_pruner,
        register_signal,
        registered_methods,
    )

# Installed, prunetune.pruning lies in this folder. In a checkout it is the folder `pruning/` beside this one, which is
# looked through as well: a checkout imports its own folders, installed or not, even where another one is installed.
if not (Path(__file__).parent / "pruning").is_dir():
    __path__.append(str(Path(__file__).resolve().parents[1]))

_HOMES = {
    "Arm": "prunetune.models",
    "EvaluateConfig": "prunetune.configs",
    "ModelConfig": "prunetune.configs",
    "PrunedModel": "prunetune.pruning",
    "PruningError": "prunetune.pruning",
    "PruningSpec": "prunetune.pruning",
    "RecalibrateConfig": "prunetune.configs",
    "Selection": "prunetune.pruning",
    "Signal": "prunetune.pruning",
    "Vision": "prunetune.pruning",
    "VisualTokens": "prunetune.pruning",
    "build_pruner": "prunetune.pruning",
    "load_config": "prunetune.configs",
    "register_pruner": "prunetune.pruning",
    "register_signal": "prunetune.pruning",
    "registered_methods": "prunetune.pruning",
}

__all__ = [
    "Arm",
    "EvaluateConfig",
    "ModelConfig",
    "PrunedModel",
    "PruningError",
    "PruningSpec",
    "RecalibrateConfig",
    "Selection",
    "Signal",
    "Vision",
    "VisualTokens",
    "build_pruner",
    "load_config",
    "register_pruner",
    "register_signal",
    "registered_methods",
]


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module 'prunetune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
