"""The one door through which every arm gets its weights: load a model, wrap, save, load and merge its projector."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from pruning.families import family_of
from pruning.types import PruningError

RECORD = "prunetune.json"
_ADAPTER = "adapter_model.safetensors"
_CARRIED = "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"


class CheckpointError(PruningError):
    """A checkpoint that is missing, broken or made for something else."""


def checkpoint_folder(path: str, revision: str | None = None) -> Path:
    """Return the local folder of a checkpoint, downloading a hub id if it is not cached.

    Raises:
        CheckpointError: if it is neither a folder nor reachable.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(_CARRIED)))
    except Exception as error:
        raise CheckpointError(
            f"model {path!r} is neither a folder nor a checkpoint that could be fetched: {error}"
        ) from error


def load_model(
    path: str, revision: str | None = None, dtype: str = "float32", attention: str = "sdpa", adapter: str | None = None
) -> tuple[nn.Module, Any]:
    """Return a stock model in eval mode and its processor; with ``adapter``, its projector is the recalibrated one.

    Args:
        path: folder or hub id.
        revision: hub revision.
        dtype: name of a torch dtype.
        attention: attention implementation of the LLM.
        adapter: folder written by a recalibration.

    Raises:
        CheckpointError: if the model can't be loaded, or the adapter belongs to another base or misses tensors.
    """
    folder = checkpoint_folder(path, revision)
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=attention
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path!r} is no vision-language checkpoint that transformers can load: {error}"
        ) from error
    processor = AutoProcessor.from_pretrained(folder)
    if adapter is not None:
        load_projector(model, adapter, frozen_hash(folder, family_of(model).projectors))
    return model.eval(), processor


def load_processor(path: str, revision: str | None = None) -> Any:
    """Return a checkpoint's processor alone; raises CheckpointError if there is none."""
    try:
        return AutoProcessor.from_pretrained(checkpoint_folder(path, revision))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path!r} holds no processor: {error}") from error


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
    names = {name for name, _ in model.named_modules()}
    absent = [w for w in wanted if not any(name == w or name.endswith(f".{w}") for name in names)]
    if absent:
        raise CheckpointError(
            f"no module is called {absent[0]!r}, so nothing of it would train; the projector of "
            f"family {family.name!r} is {', '.join(family.projectors)}"
        )
    return get_peft_model(model, LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=wanted))


def load_projector(model: nn.Module, adapter: str | Path, base_hash: str | None = None) -> None:
    """Copy an adapter's projector into ``model``; names, shapes and the base are checked first.

    The tensors are those that ``PeftModel.from_pretrained`` loads; copying them leaves the model's code unwrapped.

    Raises:
        CheckpointError: if files are missing or broken, tensors don't match, or ``base_hash`` differs from the record.
    """
    folder = Path(adapter)
    record = read_record(folder)
    if base_hash is not None and record.get("frozen_hash") != base_hash:
        raise CheckpointError(
            f"projector {folder} was recalibrated for another base: it expects "
            f"{record.get('base_model')!r} with frozen weights {record.get('frozen_hash', '')[:12]}, "
            f"this model's are {base_hash[:12]}; load it with its own base"
        )
    try:
        saved = load_file(folder / _ADAPTER)
    except Exception as error:
        raise CheckpointError(f"{folder / _ADAPTER} can't be read: {error}; save the projector again") from error
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
    with torch.no_grad():
        for name, tensor in loaded.items():
            own[name].copy_(tensor)


def projector_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the projector's tensors by name, sharing storage with the (unwrapped) model."""
    prefixes = tuple(f"model.{name}." for name in family_of(model).projectors)
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefixes)}


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

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    named = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(named, partial / _ADAPTER, metadata={"format": "pt"})
    config = peft_model.peft_config["default"]
    config.inference_mode, training = True, config.inference_mode
    config.save_pretrained(str(partial))
    config.inference_mode = training
    (partial / RECORD).write_text(json.dumps(dict(record), indent=2) + "\n")
    replace_folder(partial, folder)


def replace_folder(partial: Path, folder: Path) -> None:
    """Put a finished folder in the place of an older one; there is a complete one at every moment but the swap."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def read_record(folder: str | Path) -> dict[str, Any]:
    """Return an adapter's ``prunetune.json``.

    Raises:
        CheckpointError: if the folder is no recalibrated projector.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is no recalibrated projector: {RECORD} is missing; give the `adapter` folder of "
            "a recalibration's output"
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is broken: {error}") from None


def export_merged(model: nn.Module, processor: Any, folder: Path) -> None:
    """Write the model with its current projector as a full stock checkpoint, and LLaVA's ``mm_projector.bin``."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)  # type: ignore[operator]
    processor.save_pretrained(partial)
    llava_names = {"linear_1": "0", "linear_2": "2"}  # LLaVA's projector is Sequential(Linear, GELU, Linear)
    projector = {}
    for name, tensor in projector_state(model).items():
        *_, layer, kind = name.split(".")
        projector[f"model.mm_projector.{llava_names.get(layer, layer)}.{kind}"] = tensor.cpu()
    torch.save(projector, partial / "mm_projector.bin")
    replace_folder(partial, folder)


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names, dtypes, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def frozen_hash(folder: Path, projectors: tuple[str, ...]) -> str:
    """Return a SHA-256 of all stored weights but the projector's: the same for every dtype they are loaded in.

    Raises:
        CheckpointError: if the folder has no safetensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} holds no .safetensors weights; convert the checkpoint with save_pretrained first"
        )
    digest = hashlib.sha256()
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in sorted(weights.keys()):
                if not any(f"{projector}." in name for projector in projectors):
                    digest.update(tensor_hash({name: weights.get_tensor(name)}).encode())
    return digest.hexdigest()


def settings_hash(folder: Path) -> str:
    """Return a SHA-256 of a checkpoint's configuration, processor, tokenizer and template files."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.model")]):
        if not file.name.endswith(".index.json"):
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
