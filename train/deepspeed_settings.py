"""DeepSpeed's JSON, by a shipped name or a path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunetune.configs import ConfigError

DEEPSPEED_FOLDER = Path(__file__).resolve().parent.parent / "configs" / "deepspeed"


def deepspeed_file(name: str) -> Path:
    """Return the DeepSpeed JSON of a shipped name or of a path.

    Raises:
        ConfigError: if there is none.
    """
    for path in (DEEPSPEED_FOLDER / f"{name}.json", Path(name)):
        if path.is_file():
            return path
    raise ConfigError(f"train.deepspeed: {name!r} is neither zero1, zero2, zero3 nor the path of a DeepSpeed JSON")


def zero_stage(name: str) -> int:
    """Return the ZeRO stage of a shipped name or of a path."""
    stage: int = deepspeed_config(name)["zero_optimization"].get("stage", 0)
    return stage


def deepspeed_config(name: str) -> dict[str, Any]:
    """Return the settings of a shipped name or of a path, with linear layers computed as everywhere else.

    Under ZeRO-3 DeepSpeed replaces ``F.linear`` in the whole process by one that saves memory and rounds twice. In
    bfloat16 the features then differ from evaluation's, and a pruner keeps other tokens (VisPruner on every image).

    Raises:
        ConfigError: if there is no such file, it is no JSON object, or it asks for those linear layers.
    """
    path = deepspeed_file(name)
    try:
        settings = json.loads(path.read_text())
        zero = settings.setdefault("zero_optimization", {})
        wanted = zero.setdefault("memory_efficient_linear", False)
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"train.deepspeed: {path} is no DeepSpeed JSON: {error}") from None
    if wanted:
        raise ConfigError(
            f"train.deepspeed: {path} sets zero_optimization.memory_efficient_linear, which rounds features twice, so "
            "that training would keep other visual tokens than evaluation; set it to false or leave it out"
        )
    return settings
