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

from prunetune.models.card import CARD, adapter_card, export_card
from prunetune.models.errors import CheckpointError
from prunetune.models.hashes import tensor_hash
from prunetune.models.record import (
    ENTRY,
    FORMAT,
    RECORD,
    check_base,
    check_projector,
    config_entry,
    exported_record,
    text_of,
)
from prunetune.models.record import read_record as read_record
from prunetune.models.stored import TENSORS, BaseHashes, base_hashes
from prunetune.outputs import ADAPTER_FILES, EXPORT, OutputFolder, replaced_folder
from prunetune.pruning.families import family_of
from prunetune.reading import one_line


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


def _with_forward(model: nn.Module, projectors: tuple[str, ...]) -> list[str]:
    """Return the projector's modules that are called: of a list of modules, such as deepstack mergers, its entries."""
    names = []
    for name in projectors:
        module = model.base_model.get_submodule(name)  # type: ignore[union-attr]
        # PEFT runs a copy in place of a module, and what runs of a list are its entries.
        names += [f"{name}.{number}" for number in range(len(module))] if isinstance(module, nn.ModuleList) else [name]
    return names


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
    from safetensors.torch import save_file

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


def _stored_config(peft_model: PeftModel) -> LoraConfig:
    """Return the adapter configuration of whole projectors, whatever of them is trained."""
    own: LoraConfig = peft_model.peft_config["default"]  # type: ignore[assignment]
    if not low_rank_scales(peft_model):
        return own
    model = peft_model.get_base_model()
    whole = _with_forward(model, family_of(model).projectors)
    return LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=whole, auto_mapping=own.auto_mapping)


def export_merged(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    folder: Path,
    record: Mapping[str, Any] | None = None,
    rows: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the model with its current projector as a full stock checkpoint; LLaVA's own file lies beside it.

    Args:
        model: in the dtype that is written.
        processor: the model's.
        folder: destination.
        record: of the adapter that the projector is from; it is carried, with a model card and an entry in config.json.
        rows: measured rows of a comparison in Markdown, for the card.
        overwrite: whether a folder that holds other files may be used.

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
