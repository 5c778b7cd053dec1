"""A running mean of the weights that train (``train.ema``): measured, kept and stored in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prunetune.configs import ConfigError
from prunetune.reading import one_line
from prunetune.train.masters import float32_weight, projector_of, trained_parameters, whole

MEAN = "ema.safetensors"
"""In a checkpoint: the mean as it was then."""


def newest_share(decay: float, step: int) -> float:
    """Return the share of the newest weights in the mean after a step: each weighs ``decay`` times the one after it.

    The mean is of all weights from those before the first step, so at step 0 it is them alone: no zero it began with
    weighs in it, and the shares of all add up to 1.
    """
    return (1 - decay) / (1 - decay ** (step + 1))


class RunningMean:
    """The mean of the weights so far in float32, whole on every rank.

    Args:
        peft_model: what is trained.
        decay: how much less each weighs than the one after it.

    Attributes:
        tensors: by the name of what trains; empty before :meth:`begin`.
    """

    def __init__(self, peft_model: PeftModel, decay: float) -> None:
        self.peft_model, self.decay = peft_model, decay
        self.tensors: dict[str, Tensor] = {}

    def begin(self, checkpoint: Path | None) -> None:
        """Begin with the weights as they are, or with what a checkpoint holds; all ranks call this.

        Raises:
            ConfigError: if the checkpoint has none.
        """
        trained = trained_parameters(self.peft_model)
        if checkpoint is None:
            self.tensors = {name: float32_weight(parameter) for name, parameter in trained.items()}
            return
        try:
            loaded = load_file(checkpoint / MEAN)
        # safetensors raises an error of its own Rust side besides OSError.
        except Exception as error:
            raise ConfigError(
                f"{checkpoint / MEAN} can't be read ({one_line(error)}), so the running mean of the weights is not "
                "known; use another output folder, or set train.resume to never to start over"
            ) from None
        self.tensors = {name: loaded[name].to(parameter.device) for name, parameter in trained.items()}

    def take(self, step: int) -> None:
        """Take the weights after a step into the mean; all ranks call this."""
        share = newest_share(self.decay, step)
        for name, parameter in trained_parameters(self.peft_model).items():
            self.tensors[name].lerp_(float32_weight(parameter), share)

    def write(self, checkpoint: Path) -> None:
        """Write it into a checkpoint that is not marked complete yet."""
        save_file({name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}, checkpoint / MEAN)

    def projector(self) -> dict[str, Tensor]:
        """Return the projector that it is, by the names of the unwrapped model; all ranks call this."""
        return projector_of(self.peft_model, {name: tensor.cpu().clone() for name, tensor in self.tensors.items()})

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, the model runs with the mean, rounded to its dtype; then with its own weights again, to the bit.

        DeepSpeed's float32 weights are not touched, and no step may be taken meanwhile. All ranks call this.
        """
        own = self._exchange(self.tensors)
        try:
            yield
        finally:
            self._exchange(own)

    def _exchange(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Let the model run with other weights, and return those it ran with."""
        trained = trained_parameters(self.peft_model)
        before = {}
        with whole(list(trained.values()), writable=True), torch.no_grad():
            for name, parameter in trained.items():
                before[name] = parameter.detach().clone()
                parameter.copy_(tensors[name])
        return before


class MeanCallback(TrainerCallback):
    """Keeps the running mean; it comes before whatever measures or marks."""

    def __init__(self, mean: RunningMean) -> None:
        self.mean = mean

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin, or go on from the checkpoint."""
        step = state.global_step
        self.mean.begin(Path(str(args.output_dir)) / f"checkpoint-{step}" if step else None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the new weights in."""
        self.mean.take(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the mean into the checkpoint."""
        if state.is_world_process_zero:
            self.mean.write(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
