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
    files_hash: str,
    tensors: Mapping[str, Tensor],
    step: int,
    tracker: Tracker | None,
) -> dict[str, Any]:
    """Return the record: the base, the pruner, the data, the seed and how far training went.

    Args:
        config: the run's.
        data: what it trained on.
        files_hash: the base's :func:`~prunetune.models.hashes.frozen_files_hash`.
        tensors: the trained projector.
        step: the last step's number.
        tracker: the run's, on rank 0.
    """
    return {
        "format": 1,
        "base_model": config.model.path,
        "base_revision": config.model.revision,
        "frozen_hash": files_hash,  # of the base's files, see frozen_files_hash
        "projector_hash": tensor_hash(tensors),
        "pruning": config.pruning.model_dump(),
        "data": {
            "recipe": data.name,
            "hash": data.content_hash,
            "samples": len(data),
            "counts": data.counts,
            "missing": len(data.missing),
            "broken": len(data.broken),
            "first_broken": list(data.broken[:3]),
        },
        "train": config.train.model_dump(),
        "model": config.model.model_dump(),
        "step": step,
        "plugins": plugin_records(),
        "versions": library_versions(),
        "wandb_run": tracker.run_id if tracker is not None else None,
    }
