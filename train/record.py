"""What ``prunetune.json`` says of a recalibration."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from torch import Tensor

from prunetune.configs import RecalibrateConfig
from prunetune.data_recipes import RecipeData
from prunetune.models.hashes import tensor_hash
from prunetune.plugins import plugin_records
from prunetune.train.tracking import Tracker


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the numbers."""
    return {name: version(name) for name in ("torch", "transformers", "peft", "deepspeed", "datasets")}


def run_record(
    config: RecalibrateConfig,
    data: RecipeData,
    frozen_hash: str,
    tensors: Mapping[str, Tensor],
    step: int,
    tracker: Tracker | None,
) -> dict[str, Any]:
    """Return the record: the base, the pruner, the data, the seed and how far training went."""
    return {
        "format": 1,
        "base_model": config.model.path,
        "base_revision": config.model.revision,
        "frozen_hash": frozen_hash,
        "projector_hash": tensor_hash(tensors),
        "pruning": config.pruning.model_dump(),
        "data": {"recipe": data.name, "hash": data.content_hash, "samples": len(data), "counts": data.counts,
                 "missing": len(data.missing)},
        "train": config.train.model_dump(),
        "model": config.model.model_dump(),
        "step": step,
        "plugins": plugin_records(),
        "versions": library_versions(),
        "wandb_run": tracker.run_id if tracker is not None else None,
    }  # fmt: skip
