"""The recalibrated projector: what trains, how it is saved as a PEFT adapter, loaded again and merged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from prunetune.models.loading import CheckpointError
from prunetune.outputs import ADAPTER_FILES, EXPORT, OutputFolder, replaced_folder
from prunetune.pruning.families import family_of
from prunetune.reading import one_line, read_json, shown

RECORD = "prunetune.json"
_ADAPTER = "adapter_model.safetensors"
_READ = {"base_model": str, "frozen_hash": str, "pruning": dict}
"""What of a record is read again, and its type there."""


def wrap_projector(model: nn.Module, modules: list[str] | None = None) -> PeftModel:
    """Return the model under PEFT with full copies of ``modules`` (default: the family's projector) to train.

    Raises:
        CheckpointError: if a module does not exist, with the family's own names.
    """
    family = family_of(model)
    wanted = list(family.projectors if modules is None else modules)
    if not wanted:
        raise CheckpointError(
            f"nothing would train: the list of trainable modules is empty; leave it unset to train the projector "
            f"({', '.join(family.projectors)})"
        )
    names = [f".{name}" for name, _ in model.named_modules()]
    for module in wanted:
        # PEFT matches the end of a name, and takes a typo for nothing to train.
        if not any(name.endswith(f".{module}") for name in names):
            raise CheckpointError(
                f"no module is called {module!r}, so nothing of it would train; the projector of "
                f"family {family.name!r} is {', '.join(family.projectors)}"
            )
    # No module gets a LoRA: PEFT's own name for "none" makes an adapter of the modules to save alone.
    config = LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=wanted)
    return get_peft_model(model, config)


def load_projector(model: nn.Module, adapter: str | Path, files_hash: str | None = None) -> None:
    """Copy an adapter's projector into ``model``; names, shapes and the base are checked first.

    The tensors are those that ``PeftModel.from_pretrained`` loads; copying them leaves the model's code unwrapped.

    Args:
        model: the base.
        adapter: folder written by a recalibration.
        files_hash: the base's :func:`~prunetune.models.hashes.frozen_files_hash`; None leaves the base unchecked.

    Raises:
        CheckpointError: if files are missing or broken, tensors don't match, or ``files_hash`` differs from the record.
    """
    folder = Path(adapter)
    record = read_record(folder)
    if files_hash is not None and record.get("frozen_hash") != files_hash:
        raise CheckpointError(
            f"projector {folder} was recalibrated for another base: it expects "
            f"{record.get('base_model')!r} with frozen weights {record.get('frozen_hash', '')[:12]}, "
            f"this model's are {files_hash[:12]}; load it with its own base"
        )
    try:
        saved = load_file(folder / _ADAPTER)
    # safetensors raises an error of its own Rust side besides OSError.
    except Exception as error:
        raise CheckpointError(
            f"{folder / _ADAPTER} can't be read: {one_line(error)}; save the projector again"
        ) from error
    own = projector_state(model)
    loaded = {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}
    if loaded.keys() != own.keys():
        raise CheckpointError(f"projector {folder} holds {sorted(loaded)}, the model expects {sorted(own)}")
    for name, tensor in loaded.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"projector {folder}: {name} has shape {tuple(tensor.shape)}, the model expects "
                f"{tuple(own[name].shape)}; it belongs to a model of another size"
            )
    # Only now, when everything fits: a projector copied by half would be nobody's.
    with torch.no_grad():
        for name, tensor in loaded.items():
            own[name].copy_(tensor)


def projector_state(model: nn.Module, keep_vars: bool = False) -> dict[str, Tensor]:
    """Return the projector's tensors by name, sharing storage with the (unwrapped) model.

    With ``keep_vars`` they are the model's own parameters, not views of them.
    """
    prefixes = tuple(f"model.{name}." for name in family_of(model).projectors)
    state = model.state_dict(keep_vars=keep_vars)
    return {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], peft_model: PeftModel, record: Mapping[str, Any]
) -> None:
    """Write a stock-loadable PEFT adapter and ``prunetune.json``; the folder appears complete or not at all.

    Args:
        folder: destination; an older adapter there is replaced.
        tensors: the projector's weights by their name in the unwrapped model.
        peft_model: supplies the adapter configuration.
        record: what ``prunetune.json`` says of the run.
    """
    from safetensors.torch import save_file

    named = {}
    for name, tensor in tensors.items():
        named[f"base_model.model.{name}"] = tensor.detach().cpu().contiguous()
    with replaced_folder(folder, ADAPTER_FILES, sign=RECORD) as partial:
        save_file(named, partial / _ADAPTER, metadata={"format": "pt"})
        # Stored in inference mode, as PEFT's own save does; the running model goes on training.
        config = peft_model.peft_config["default"]
        config.inference_mode, training = True, config.inference_mode
        config.save_pretrained(str(partial))
        config.inference_mode = training
        (partial / RECORD).write_text(json.dumps(dict(record), indent=2) + "\n")


def read_record(folder: str | Path) -> dict[str, Any]:
    """Return an adapter's ``prunetune.json``.

    Raises:
        CheckpointError: if the folder is no recalibrated projector, or its record is broken.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is no recalibrated projector: {RECORD} is missing; give the `adapter` folder of "
            "a recalibration's output"
        )
    record = read_json(path, CheckpointError)
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} is broken: expected an object, got {type(record).__name__}")
    for name, kind in _READ.items():
        if name in record and not isinstance(record[name], kind):
            raise CheckpointError(f"{path} is broken: {name} is {shown(record[name])}, expected {kind.__name__}")
    return record


def tuned_for(folder: str | Path) -> dict[str, Any]:
    """Return the pruning that an adapter was recalibrated for; raises CheckpointError if its record does not say."""
    record = read_record(folder)
    if "pruning" not in record:
        raise CheckpointError(f"{Path(folder) / RECORD} is broken: it does not say for which pruning it was made")
    return record["pruning"]


def export_merged(model: PreTrainedModel, processor: ProcessorMixin, folder: Path, overwrite: bool = False) -> None:
    """Write the model with its current projector as a full stock checkpoint; LLaVA's own file lies beside it.

    Raises:
        OutputError: if the folder holds something else than an export, or can't be written.
    """
    with OutputFolder(folder, EXPORT, overwrite) as output, output.staged(whole=True) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        projector = _llava_projector(projector_state(model))
        if projector is not None:
            torch.save(projector, partial / "mm_projector.bin")


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
