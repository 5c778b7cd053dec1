"""What features depend on, part by part, so that a refusal can say which part differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from prunetune.models.adapter import projector_state
from prunetune.models.arm import Arm
from prunetune.models.hashes import tensor_hash
from prunetune.pruning import Budget, PrunedModel
from prunetune.pruning.signals import of_source, signal_of
from prunetune.pruning.stored import choice_of, is_all_tokens

# Of a configuration: where it was read from, by whom and in which dtype decides nothing, or is a part of its own.
_ELSEWHERE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "_attn_implementation")
_VISION_KEYS = ("vision", "image", "mm_", "projector", "multimodal", "downsample", "pixel")


def model_parts(arm: Arm) -> dict[str, Any]:
    """Return what the features of an image depend on beside the image, by name, as JSON values.

    Call it before the model is wrapped by PEFT or partitioned by ZeRO-3.
    """
    config = arm.base.config
    return {
        "tower weights": tower_hash(arm.pruned),
        "vision configuration": _hash(_vision_config(arm.model)),
        "model.dtype": config.dtype,
        "model.quantization": config.quantization,
        "model.square": config.square,
        "processor settings": _hash(_processor_settings(arm.processor)),
    }


def choice_parts(arm: Arm, keep: Budget | None = None) -> dict[str, Any]:
    """Return what an arm's choice depends on beside features: pruner and budget, and the text side if it reads one.

    Args:
        arm: with the pruner.
        keep: another budget than the arm's.
    """
    choice = choice_of(arm.pruned.spec, keep)
    parts: dict[str, Any] = {
        "choice": choice,
        "text tower": arm.text_tower_hash,
        "token embeddings": embeddings_hash(arm.pruned),
    }
    if arm.pruned.spec.choose_with == "original" and not is_all_tokens(choice):
        parts["original projector"] = arm.base.hashes.original_projector_hash
    return parts


def differing(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of the parts that differ."""
    return [name for name, value in now.items() if stored.get(name) != value]


def tower_hash(pruned: PrunedModel) -> str:
    """Return a SHA-256 of everything on the vision side, as it is loaded, but the projector.

    It is what is neither language model nor head nor projector, so that no family has to list it.
    """
    model: Any = pruned.model
    elsewhere: set[int] = {id(tensor) for tensor in projector_state(model, keep_vars=True).values()}
    parts: list[nn.Module] = [pruned.family.llm(model)]
    head = model.get_output_embeddings()
    if head is not None:
        parts.append(head)
    for part in parts:
        elsewhere |= {id(tensor) for tensor in [*part.parameters(), *part.buffers()]}
    own: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in elsewhere:
            own[name] = tensor
    return tensor_hash(own)


def embeddings_hash(pruned: PrunedModel) -> str | None:
    """Return a SHA-256 of the LLM's token embeddings, where the pruner compares visual tokens with them; else None."""
    spaces = {signal_of(need).space for need in of_source(pruned.needs, "text")}
    if "llm" not in spaces:
        return None
    embeddings: Any = pruned.model.get_input_embeddings()
    return tensor_hash({"weight": embeddings.weight})


def _vision_config(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    values = {}
    for name, value in config.to_dict().items():
        if name.startswith(_VISION_KEYS):
            values[name] = value
    return _without(values)


def _without(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without what decides nothing, at any depth."""
    kept = {}
    for name, value in values.items():
        if name not in _ELSEWHERE:
            kept[name] = _without(value) if isinstance(value, dict) else value
    return kept


def _processor_settings(processor: Any) -> dict[str, Any]:
    """Return what turns an image into pixels and placeholders."""
    settings: dict[str, Any] = {"image processor": _without(processor.image_processor.to_dict())}
    settings["image processor"].pop("processor_class", None)
    # Slow and fast ones of one model round otherwise.
    settings["class"] = type(processor.image_processor).__name__
    for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "image_seq_len"):
        settings[name] = getattr(processor, name, None)
    return settings


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
