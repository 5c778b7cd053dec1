"""The projector under PEFT: what trains, and how it is saved as a stock adapter. Nothing else here needs PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import save_file
from torch import Tensor, nn

from prunetune.models.adapter import read_projector
from prunetune.models.card import CARD, adapter_card
from prunetune.models.errors import CheckpointError
from prunetune.models.hashes import tensor_hash
from prunetune.models.record import FORMAT, RECORD, text_of
from prunetune.models.stored import TENSORS, BaseHashes
from prunetune.outputs import ADAPTER_FILES, replaced_folder
from prunetune.pruning.families import family_of


def wrap_projector(model: nn.Module, modules: list[str] | None = None) -> PeftModel:
    """Return the model under PEFT with full copies of ``modules`` (default: the family's projector) to train.

    Raises:
        CheckpointError: if a module does not exist, with the family's own names.
    """
    family = family_of(model)
    wanted = _with_forward(model, family.projectors) if modules is None else list(modules)
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


def wrap_low_rank(model: nn.Module, rank: int) -> PeftModel:
    """Return the model under PEFT with a low-rank change beside each linear layer of the projector to train.

    Each is ``B A`` with rank ``rank`` and ``B`` zero at first, so that the projector begins as it is.

    Raises:
        CheckpointError: if the projector has no linear layers.
    """
    family = family_of(model)
    prefixes = tuple(f"model.{name}" for name in family.projectors)
    linears = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name in prefixes or name.startswith(tuple(f"{p}." for p in prefixes))):
            linears.append(name)
    if not linears:
        raise CheckpointError(
            f"train.variant lora changes linear layers, and the projector of family {family.name!r} "
            f"({', '.join(family.projectors)}) has none; set train.variant to full"
        )
    # Of the model's dtype, as the projector itself when it trains: DeepSpeed has the float32 ones.
    config = LoraConfig(target_modules=linears, r=rank, lora_alpha=rank, lora_dropout=0.0)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def low_rank_scales(peft_model: PeftModel) -> dict[str, float]:
    """Return the layers with a low-rank change, by name in the unwrapped model, and what ``B A`` is multiplied by."""
    scales = {}
    for name, module in peft_model.get_base_model().named_modules():
        if "default" in getattr(module, "lora_A", {}):
            scales[name] = float(module.scaling["default"])  # type: ignore[index, union-attr]
    return scales


def start_projector(peft_model: PeftModel, adapter: str | Path, base: BaseHashes) -> dict[str, Tensor]:
    """Copy an adapter's projector into what is to be trained; the original beside it stays the base's.

    Args:
        peft_model: made by :func:`wrap_projector`, before DeepSpeed has it.
        adapter: folder written by a recalibration.
        base: what the base's files hold.

    Returns:
        The projector as it is stored, by the names of the unwrapped model.

    Raises:
        CheckpointError: as :func:`read_projector` does.
    """
    own = unwrapped_projector(peft_model)
    _, loaded = read_projector(adapter, own, base)
    with torch.no_grad():
        for name, tensor in loaded.items():
            own[name].copy_(tensor)
    return loaded


def unwrapped_projector(peft_model: PeftModel) -> dict[str, Tensor]:
    """Return the projector's parameters that run under PEFT, by their name in the unwrapped model.

    Of low-rank changes it is what they are added to.
    """
    model = peft_model.get_base_model()
    prefixes = tuple(f"model.{name}." for name in family_of(model).projectors)
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." in name or ".lora_" in name or not name.startswith(prefixes):
            continue
        found[name.replace(".modules_to_save.default", "").replace(".base_layer.", ".")] = parameter
    return found


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], like: PeftModel | Path, record: Mapping[str, Any]
) -> None:
    """Write a stock-loadable PEFT adapter and ``prunetune.json``; the folder appears complete or not at all.

    Args:
        folder: destination; an older adapter there is replaced.
        tensors: the projector's weights by their name in the unwrapped model.
        like: supplies the adapter configuration: what was trained, or the folder of another adapter of the same base.
        record: what ``prunetune.json`` says of the run.
    """
    named = {}
    for name, tensor in tensors.items():
        named[f"base_model.model.{name}"] = tensor.detach().cpu().contiguous()
    # Of what is written, whatever the run held in memory: load_projector compares it with the file.
    record = {**record, "format": FORMAT, "projector_hash": tensor_hash(tensors)}
    with replaced_folder(folder, ADAPTER_FILES, sign=RECORD) as partial:
        save_file(named, partial / TENSORS, metadata={"format": "pt"})
        # Stored in inference mode, as PEFT's own save does; the running model goes on training.
        config = LoraConfig.from_pretrained(str(like)) if isinstance(like, Path) else _stored_config(like)
        config.inference_mode, training = True, config.inference_mode
        # PEFT has the folder that the weights were read from, which is one of this machine.
        config.base_model_name_or_path, base = record.get("base_model"), config.base_model_name_or_path
        config.save_pretrained(str(partial))
        config.inference_mode, config.base_model_name_or_path = training, base
        (partial / RECORD).write_text(text_of(record))
        (partial / CARD).write_text(adapter_card(record))


def _with_forward(model: nn.Module, projectors: tuple[str, ...]) -> list[str]:
    """Return the projector's modules that are called: of a list of modules, such as deepstack mergers, its entries."""
    names = []
    for name in projectors:
        module = model.base_model.get_submodule(name)  # type: ignore[union-attr]
        # PEFT runs a copy in place of a module, and what runs of a list are its entries.
        names += [f"{name}.{number}" for number in range(len(module))] if isinstance(module, nn.ModuleList) else [name]
    return names


def _stored_config(peft_model: PeftModel) -> LoraConfig:
    """Return the adapter configuration of whole projectors, whatever of them is trained."""
    own: LoraConfig = peft_model.peft_config["default"]  # type: ignore[assignment]
    if not low_rank_scales(peft_model):
        return own
    model = peft_model.get_base_model()
    whole = _with_forward(model, family_of(model).projectors)
    return LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=whole, auto_mapping=own.auto_mapping)
