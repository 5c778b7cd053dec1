"""Fine-tuning of vision-language models whose visual tokens are pruned.

The names below are imported when they are first used, so that ``import prunetune`` costs nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prunetune.lazy import importer

if __name__ != "prunetune":
    raise ImportError(f"import prunetune, not {__name__}: a second name would load everything twice")

if TYPE_CHECKING:
    from prunetune.configs import EvaluateConfig as EvaluateConfig
    from prunetune.configs import ModelConfig as ModelConfig
    from prunetune.configs import RecalibrateConfig as RecalibrateConfig
    from prunetune.configs import load_config as load_config
    from prunetune.models import Arm as Arm
    from prunetune.models import load as load
    from prunetune.pruning import PrunedModel as PrunedModel
    from prunetune.pruning import PruningError as PruningError
    from prunetune.pruning import PruningSpec as PruningSpec
    from prunetune.pruning import Selection as Selection
    from prunetune.pruning import Signal as Signal
    from prunetune.pruning import Stage as Stage
    from prunetune.pruning import StageSpec as StageSpec
    from prunetune.pruning import Vision as Vision
    from prunetune.pruning import VisualTokens as VisualTokens
    from prunetune.pruning import build_pruner as build_pruner
    from prunetune.pruning import register_pruner as register_pruner
    from prunetune.pruning import register_signal as register_signal
    from prunetune.pruning import register_stage as register_stage
    from prunetune.pruning import registered_methods as registered_methods
    from prunetune.pruning import registered_stages as registered_stages

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
    "Stage": "prunetune.pruning",
    "StageSpec": "prunetune.pruning",
    "Vision": "prunetune.pruning",
    "VisualTokens": "prunetune.pruning",
    "build_pruner": "prunetune.pruning",
    "load": "prunetune.models",
    "load_config": "prunetune.configs",
    "register_pruner": "prunetune.pruning",
    "register_signal": "prunetune.pruning",
    "register_stage": "prunetune.pruning",
    "registered_methods": "prunetune.pruning",
    "registered_stages": "prunetune.pruning",
}

__all__ = list(_HOMES)
__getattr__ = importer(__name__, _HOMES)
