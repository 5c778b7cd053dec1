"""Projectors that are made of others without any training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from prunetune.models.adapter import projector_state, read_projector
from prunetune.models.arm import Base
from prunetune.models.errors import CheckpointError
from prunetune.models.hashes import tensor_hash
from prunetune.models.record import required
from prunetune.models.seal import SEAL

_OF_TRAINING = ("held_out",)
"""What a record says of the trained weights alone, and of none that are made of them."""


def original_projector(base: Base) -> dict[str, Tensor]:
    """Return the base's own projector as its files hold it, by the names of the model, whatever dtype it runs in."""
    loaded = projector_state(base.model)
    found = dict(loaded)
    for file in sorted(base.folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - it is no dictionary
                # Releases of transformers prefix stored names differently.
                own = next((key for key in loaded if f".{name}".endswith(f".{key.removeprefix('model.')}")), None)
                if own is None or stored.get_slice(name).get_shape() != list(loaded[own].shape):
                    continue
                tensor = stored.get_tensor(name)
                if torch.equal(tensor.to(loaded[own].dtype), loaded[own].cpu()):
                    found[own] = tensor
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def at_strength(original: Mapping[str, Tensor], tuned: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
    """Return ``original + strength (tuned - original)`` in float32: at 0 and at 1 one of the two to the bit.

    Args:
        original: by name.
        tuned: of the same names and shapes.
        strength: any number.

    Raises:
        CheckpointError: if the strength is not finite.
    """
    if not math.isfinite(strength):
        raise CheckpointError(f"a strength is a number, 0 for the base's projector and 1 for the tuned, got {strength}")
    between = {}
    for name, tensor in original.items():
        # torch.lerp starts from the nearer end, so that both are exact.
        between[name] = torch.lerp(tensor.double().cpu(), tuned[name].double().cpu(), strength).float()
    return between


def dialled(base: Base, adapter: Path, strength: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an adapter's projector at a strength, and the record that it is written or exported with.

    Args:
        base: the adapter's.
        adapter: its folder.
        strength: 0 is the base's projector, 1 the tuned one.

    Raises:
        CheckpointError: if the adapter is another base's or broken, or the strength is not finite.
    """
    record, tuned = read_projector(adapter, projector_state(base.model), base.hashes)
    tensors = at_strength(original_projector(base), tuned, strength)
    return tensors, dialled_record(record, tensors, strength, adapter)


def dialled_record(
    record: Mapping[str, Any], tensors: Mapping[str, Tensor], strength: float, adapter: Path
) -> dict[str, Any]:
    """Return the record of a projector at a strength: the tuned one's, with ``strength`` and ``from``, its hash."""
    source = required(record, "projector_hash", adapter)
    return {
        **{name: value for name, value in record.items() if name not in (SEAL, *_OF_TRAINING)},
        "projector_hash": tensor_hash(tensors),
        "stored_in": "float32",
        "strength": float(strength),
        "from": source,
    }


def put_projector(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the projector of an unwrapped model, in its dtype."""
    own = projector_state(model)
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
