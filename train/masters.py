"""DeepSpeed's float32 weights of what trains, of which a half-precision model runs with a rounded copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.utils import safe_set_full_fp32_param
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prunetune.models.adapter import unwrapped_projector


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
