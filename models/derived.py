"""Projectors that are made of others without any training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from prunetune.models.adapter import check_finite, projector_state, read_projector, stored_projector
from prunetune.models.arm import Base
from prunetune.models.code import code_record
from prunetune.models.errors import CheckpointError
from prunetune.models.hashes import tensor_hash
from prunetune.models.record import check_projector, read_record, required
from prunetune.models.seal import CHAIN, SEAL, short

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


_BASE = ("frozen_hash", "original_projector_hash", "settings_hash")
_OF_FIRST = (
    "base_model",
    "base_revision",
    "license",
    *_BASE,
    "projectors",
    "text_tower_hash",
    "pruning",
    "profile",
    "model",
    "versions",
    "trained_in",
)


def soup(adapters: Sequence[Path], weights: Sequence[float] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the mean of several projectors of one base, in float32, and its record.

    Args:
        adapters: their folders; what the mean says it is for, its pruning and its model, are the first one's.
        weights: of each in the mean, of any sum; None weighs all alike.

    Raises:
        CheckpointError: if there are fewer than two, one is broken, they are of different bases, or a weight is
            negative or all are 0.
    """
    shares = _shares(adapters, weights)
    records: list[dict[str, Any]] = []
    total: dict[str, Tensor] = {}
    for folder, share in zip(adapters, shares, strict=True):
        record, tensors = _read(folder)
        if records:
            _check_alike(adapters[0], records[0], total, folder, record, tensors)
        for name, tensor in tensors.items():
            # In float64: three thirds of a weight are the weight again.
            part = share * tensor.double()
            total[name] = total[name] + part if name in total else part
        records.append(record)
    mean = {name: tensor.float() for name, tensor in total.items()}
    return mean, _soup_record(records, shares, mean)


def _shares(adapters: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    if len(adapters) < 2:
        raise CheckpointError(f"a mean is of two projectors at least, got {len(adapters)}")
    weights = [1.0] * len(adapters) if weights is None else weights
    if len(weights) != len(adapters):
        raise CheckpointError(
            f"there are {len(adapters)} adapters and {len(weights)} weights; give one weight for each"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise CheckpointError(f"weights are 0 or more, and one at least is more, got {', '.join(map(str, weights))}")
    return [weight / sum(weights) for weight in weights]


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an adapter's record and tensors, as they were written and finite."""
    record, tensors = read_record(folder), stored_projector(folder)
    for name in _BASE[:2]:
        required(record, name, folder)
    check_projector(record, folder, tensor_hash(tensors))
    check_finite(tensors, f"projector {folder}")
    return record, tensors


def _check_alike(
    first: Path,
    expected: Mapping[str, Any],
    total: Mapping[str, Tensor],
    folder: Path,
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    for name in _BASE:
        if expected.get(name) != record.get(name):
            raise CheckpointError(
                f"{first} and {folder} are of different bases, whose projectors have no mean: {CHAIN[name]}: "
                f"{short(expected.get(name))} and {short(record.get(name))}"
            )
    prunings = [own.get("pruning") or {} for own in (expected, record)]
    for name, default in (("choose_with", "tuned"), ("text_tower", None)):
        values = [pruning.get(name, default) for pruning in prunings]
        if values[0] != values[1]:
            raise CheckpointError(
                f"{first} and {folder} were tuned with another pruning.{name}: {values[0]} and {values[1]}; average "
                "projectors whose tokens were chosen alike"
            )
    shapes = [{name: tuple(tensor.shape) for name, tensor in those.items()} for those in (total, tensors)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(f"{first} and {folder} hold other tensors: {shapes[0]} and {shapes[1]}")


def _soup_record(
    records: Sequence[Mapping[str, Any]], shares: Sequence[float], mean: Mapping[str, Tensor]
) -> dict[str, Any]:
    sources = []
    for record, share in zip(records, shares, strict=True):
        sources.append({"projector_hash": record["projector_hash"], "pruning": record.get("pruning"), "weight": share})
    elastic = records[0].get("elastic")
    alike = elastic is not None and all(record.get("elastic") == elastic for record in records)
    plugins = {plugin["name"]: plugin for record in records for plugin in record.get("plugins") or []}
    return {
        **{name: records[0].get(name) for name in _OF_FIRST},
        "projector_hash": tensor_hash(mean),
        "stored_in": "float32",
        "soup": sources,
        **({"elastic": elastic} if alike else {}),
        "prunetune": code_record(),
        "plugins": list(plugins.values()),
    }
