"""The recalibrated projector: read from an adapter, checked, copied into a model, and merged into a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from prunetune.models.card import CARD, export_card
from prunetune.models.errors import CheckpointError
from prunetune.models.hashes import tensor_hash
from prunetune.models.record import (
    ENTRY,
    RECORD,
    check_base,
    check_projector,
    config_entry,
    exported_record,
    text_of,
)
from prunetune.models.record import read_record as read_record
from prunetune.models.stored import TENSORS, BaseHashes, base_hashes
from prunetune.outputs import EXPORT, OutputFolder
from prunetune.pruning.families import family_of
from prunetune.reading import one_line


def load_projector(model: nn.Module, adapter: str | Path, base: BaseHashes | None = None) -> None:
    """Copy an adapter's projector into ``model``; its record, its tensors and the base are checked first.

    The tensors are those that ``PeftModel.from_pretrained`` loads; copying them leaves the model's code unwrapped.

    Args:
        model: the base.
        adapter: folder written by a recalibration.
        base: what the base's files hold; None leaves the base unchecked.

    Raises:
        CheckpointError: as :func:`read_projector` does.
    """
    own = projector_state(model)
    _, loaded = read_projector(adapter, own, base)
    with torch.no_grad():
        for name, tensor in loaded.items():
            own[name].copy_(tensor)


def read_projector(
    adapter: str | Path, own: Mapping[str, Tensor], base: BaseHashes | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an adapter's record and its tensors as they are stored, by their name in the unwrapped model.

    Args:
        adapter: folder written by a recalibration.
        own: the projector that they must fit, in names, shapes, and the dtype in which they must be finite.
        base: what the base's files hold; None leaves the base unchecked.

    Raises:
        CheckpointError: if files are missing or broken, tensors don't match or are not finite, the record was edited,
            or one of the hashes differs: of the tensors, of the base, of the projector that training started from.
    """
    folder = Path(adapter)
    record = read_record(folder)
    if base is not None:
        check_base(record, folder, base)
    loaded = stored_projector(folder)
    if loaded.keys() != own.keys():
        raise CheckpointError(f"projector {folder} holds {sorted(loaded)}, the model expects {sorted(own)}")
    for name, tensor in loaded.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"projector {folder}: {name} has shape {tuple(tensor.shape)}, the model expects "
                f"{tuple(own[name].shape)}; it belongs to a model of another size"
            )
    # As they are in the file: what they become in the model's dtype is another hash, for the manifests of arms.
    check_projector(record, folder, tensor_hash(loaded))
    check_finite({name: tensor.to(own[name].dtype) for name, tensor in loaded.items()}, f"projector {folder}")
    return record, loaded


def stored_projector(folder: Path) -> dict[str, Tensor]:
    """Return an adapter's tensors as its file holds them, unchecked, by their name in the unwrapped model.

    Raises:
        CheckpointError: if the file is missing or broken.
    """
    try:
        saved = load_file(folder / TENSORS)
    # safetensors raises an error of its own Rust side besides OSError.
    except Exception as error:
        raise CheckpointError(
            f"{folder / TENSORS} can't be read: {one_line(error)}; save the projector again"
        ) from error
    return {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Check that no value is NaN or infinite; raises CheckpointError naming the first tensor that holds one."""
    for name, tensor in tensors.items():
        # Also values that a float16 model can't hold: they are finite in the file and infinite in the model.
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{what}: {name} holds NaN or infinity as {str(tensor.dtype).removeprefix('torch.')}; recalibrate "
                "again with a lower train.learning_rate, or load it in another dtype"
            )


def projector_state(model: nn.Module, keep_vars: bool = False) -> dict[str, Tensor]:
    """Return the projector's tensors by name, sharing storage with the (unwrapped) model.

    With ``keep_vars`` they are the model's own parameters, not views of them.
    """
    prefixes = tuple(f"model.{name}." for name in family_of(model).projectors)
    state = model.state_dict(keep_vars=keep_vars)
    return {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}


def export_merged(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    folder: Path,
    record: Mapping[str, Any] | None = None,
    rows: str | None = None,
    overwrite: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write the model with its current projector as a full stock checkpoint; LLaVA's own file lies beside it.

    Args:
        model: in the dtype that is written.
        processor: the model's.
        folder: destination.
        record: of the adapter that the projector is from; it is carried, with a model card and an entry in config.json.
        rows: measured rows of a comparison in Markdown, for the card.
        overwrite: whether a folder that holds other files may be used.
        finish: is called with the folder before the weights in it are hashed, and may add to it.

    Raises:
        CheckpointError: if the projector holds NaN or infinity; nothing is written then.
        OutputError: if the folder holds something else than an export, or can't be written.
    """
    check_finite(projector_state(model), "the projector")
    with OutputFolder(folder, EXPORT, overwrite) as output, output.staged(whole=True) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        projector = _llava_projector(projector_state(model))
        if projector is not None:
            torch.save(projector, partial / "mm_projector.bin")
        if finish is not None:
            finish(partial)
        if record is not None:
            _say_what_it_is(partial, record, family_of(model).projectors, rows)


def _say_what_it_is(folder: Path, record: Mapping[str, Any], projectors: tuple[str, ...], rows: str | None) -> None:
    """Write an export's record, its card, and the entry in its configuration."""
    carried = exported_record(record, base_hashes(folder, projectors))
    (folder / RECORD).write_text(text_of(carried))
    (folder / CARD).write_text(export_card(carried, rows))
    # Into the file and not into the model's configuration: the model belongs to an arm that goes on.
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, ENTRY: config_entry(carried)}, indent=2) + "\n", encoding="utf-8")


def _llava_projector(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return a two-layer projector under LLaVA's own names, ``Sequential(Linear, GELU, Linear)``; None for another."""
    numbers = {"linear_1": "0", "linear_2": "2"}  # number 1 is the GELU, which has no weights
    named = {}
    for name, tensor in tensors.items():
        *_, layer, kind = name.split(".")
        if layer not in numbers:
            return None
        named[f"model.mm_projector.{numbers[layer]}.{kind}"] = tensor.cpu()
    return named
