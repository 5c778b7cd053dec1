"""What ``prunetune.json`` says of a recalibration."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from torch import Tensor

from prunetune.configs import RecalibrateConfig
from prunetune.configs.schema import ObjectiveConfig
from prunetune.data_recipes import RecipeData
from prunetune.models import Arm
from prunetune.models.card import license_of
from prunetune.models.code import code_record
from prunetune.models.hashes import tensor_hash
from prunetune.models.record import FORMAT, portable
from prunetune.plugins import plugin_records
from prunetune.train.start_from import Start
from prunetune.train.tracking import Tracker


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the numbers."""
    return {name: version(name) for name in ("torch", "transformers", "peft", "deepspeed", "datasets")}


def run_record(
    config: RecalibrateConfig,
    data: RecipeData,
    arm: Arm,
    tensors: Mapping[str, Tensor],
    step: int,
    tracker: Tracker | None,
    features: str | None = None,
    begins: Start | None = None,
) -> dict[str, Any]:
    """Return the record: the base, the pruner, the data, the seed and how far training went.

    Paths stand in it as they were given, but absolute ones by their last part: the record travels with the adapter, and
    the run's config.yaml, which stays where it is, has them whole.

    Args:
        config: the run's.
        data: what it trained on.
        arm: what was trained; of it the pruning as it ran, the base's hashes and the text tower's.
        tensors: the trained projector.
        step: the last step's number.
        tracker: the run's, on rank 0.
        features: the seal of the feature cache that it was trained from.
        begins: the adapter whose projector training began with; None began with the base's.
    """
    ran = config.pruning if arm.profile is None else arm.profile.fill(config.pruning)
    model, pruning, train = config.model.model_dump(), ran.model_dump(), config.train.model_dump()
    for section, name in ((model, "path"), (model, "template"), (pruning, "text_tower"), (train, "deepspeed")):
        section[name] = portable(section[name])
    record: dict[str, Any] = {
        "format": FORMAT,
        "base_model": model["path"],
        "base_revision": config.model.revision,
        "license": license_of(arm.base.folder),
        **arm.base.hashes.record(),
        "settings_hash": arm.base.settings_hash,
        "text_tower_hash": arm.text_tower_hash,
        "projector_hash": tensor_hash(tensors),
        "pruning": pruning,
        "profile": None if arm.profile is None else arm.profile.link(),
        "data": {
            "recipe": data.name,
            "hash": data.content_hash,
            "samples": len(data),
            "counts": data.counts,
            "missing": len(data.missing),
            "broken": len(data.broken),
            "first_broken": list(data.broken[:3]),
        },
        "train": train,
        "engine": config.engine.model_dump(),
        "model": model,
        "step": step,
        "prunetune": code_record(),
        "plugins": plugin_records(),
        "versions": library_versions(),
        "wandb_run": tracker.run_id if tracker is not None else None,
        "trained_in": config.model.dtype,
        "stored_in": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        "features": features,
    }
    # Named where they are used alone: records of other runs stay, to the byte.
    if config.elastic.on:
        record["elastic"] = config.elastic.model_dump()
    if config.objective != ObjectiveConfig():
        record["objective"] = config.objective.model_dump()
    if begins is not None:
        train["start_from"] = portable(begins.adapter)
        record["started_from"] = begins.record()
    return record
