"""DeepSpeed's float32 weights of what trains, of which a half-precision model runs with a rounded copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prunetune.models.peft_adapter import low_rank_scales, unwrapped_projector
from prunetune.pruning.hooks import is_partitioned


def gathered_projector(peft_model: PeftModel) -> dict[str, Tensor]:
    """Return the projector as it is trained by its names in the unwrapped model, on every rank, also under ZeRO-3.

    Raises:
        RuntimeError: as :func:`gathered_weights` does.
    """
    return projector_of(peft_model, gathered_weights(peft_model))


def projector_of(peft_model: PeftModel, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the whole projector that trained weights make: they are it, or are added to it; all ranks call this.

    Args:
        peft_model: what is trained.
        trained: its trained weights, by the names of :func:`trained_parameters`, on the CPU.
    """
    scales = low_rank_scales(peft_model)
    if not scales:
        return dict(trained)
    own = unwrapped_projector(peft_model)
    with whole(list(own.values())):
        tensors = {name: parameter.detach().cpu().float().clone() for name, parameter in own.items()}
    for name, scale in scales.items():
        down, up = (trained[f"{name}.lora_{part}.default.weight"].float() for part in "AB")
        tensors[f"{name}.weight"] += scale * (up @ down)
    return tensors


def gathered_weights(peft_model: PeftModel) -> dict[str, Tensor]:
    """Return the trained tensors by their name in the unwrapped model, on every rank, also under ZeRO-3.

    They are DeepSpeed's float32 weights, of which a half-precision model runs with a rounded copy: most of a small
    step is less than half the distance between two bfloat16 numbers. Where DeepSpeed keeps none, they are the model's.

    Raises:
        RuntimeError: if the rounded ones are not what the model ran with.
    """
    trained = trained_parameters(peft_model)
    with whole(list(trained.values())):
        # Cloned: under ZeRO-3 the whole ones are gone when the context closes.
        ran_with = {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}
    tensors = {}
    for name, parameter in trained.items():
        tensors[name] = _in_float32(name, parameter, ran_with[name])
    return tensors


def trained_parameters(peft_model: PeftModel) -> dict[str, nn.Parameter]:
    """Return what trains by its name in the unwrapped model."""
    trained = {}
    for name, parameter in peft_model.get_base_model().named_parameters():
        if parameter.requires_grad:
            trained[name.replace(".modules_to_save.default", "")] = parameter
    return trained


def float32_weight(parameter: nn.Parameter) -> Tensor:
    """Return a copy of a weight as it is trained, in float32 on its device; all ranks call this.

    It is DeepSpeed's own where the model runs with a rounded one, and where DeepSpeed keeps none the model's.
    """
    if parameter.dtype != torch.float32:
        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            return master.detach().float().clone()
    with whole([parameter]):
        return parameter.detach().float().clone()


def _in_float32(name: str, parameter: torch.nn.Parameter, ran_with: Tensor) -> Tensor:
    if ran_with.dtype == torch.float32:
        return ran_with
    master = safe_get_full_fp32_param(parameter)  # all ranks call this: each holds a piece
    if master is None:
        return ran_with
    master = master.detach().cpu().clone()
    if not torch.equal(master.to(ran_with.dtype), ran_with):
        raise RuntimeError(f"{name}: DeepSpeed's float32 weights are not those the model ran with. Please report this")
    return master


class StartCallback(TrainerCallback):
    """Gives DeepSpeed's float32 weights the digits that the model's dtype has no room for, before the first step.

    Args:
        peft_model: what is trained; it holds the same weights, rounded.
        tensors: the projector as the adapter stores it.
    """

    def __init__(self, peft_model: PeftModel, tensors: Mapping[str, Tensor]) -> None:
        self.peft_model, self.tensors = peft_model, tensors

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set them, on all ranks; a run that goes on has them in its checkpoint."""
        if state.global_step:
            return
        for name, parameter in unwrapped_projector(self.peft_model).items():
            # Under ZeRO-3 DeepSpeed can't set one that does not divide by the ranks; that one begins rounded.
            if parameter.requires_grad and self.tensors[name].numel() % args.world_size == 0:
                safe_set_full_fp32_param(parameter, self.tensors[name].to(args.device).float())


def whole(parameters: Sequence[Any], writable: bool = False) -> Any:
    """Return a context in which parameters that ZeRO-3 holds in pieces are whole on every rank.

    Args:
        parameters: of a model.
        writable: whether they are changed within it; what rank 0 has made of them is then everybody's.
    """
    if not is_partitioned(parameters):
        return nullcontext()
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if writable else None)
