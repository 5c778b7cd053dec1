"""What happens around the optimizer steps: numbers, a progress bar, and the mark of a complete checkpoint."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prunetune.screen import SCREEN
from prunetune.train.tracking import Tracker

COMPLETE = "complete.json"


class NumbersCallback(TrainerCallback):
    """Logs loss, speed and ETA, draws the progress bar, and stops on a loss that is not finite.

    Args:
        tracker: the run's, on rank 0; the other ranks have none and only stop.
        samples_per_step: over all ranks.
    """

    def __init__(self, tracker: Tracker | None, samples_per_step: int) -> None:
        self.tracker = tracker
        self.samples_per_step = samples_per_step
        self.bar: tqdm | None = None
        self.began = 0.0
        self.first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock and the bar."""
        self.began, self.first_step = time.monotonic(), state.global_step
        if self.tracker is not None:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="recalibrate",
                unit="step",
                dynamic_ncols=True,
                mininterval=1.0,
                file=SCREEN,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write one row of numbers.

        Raises:
            FloatingPointError: if the loss or the gradient is NaN or infinite; nothing is saved after it.
        """
        logs = logs or {}
        if "loss" not in logs:
            return
        # Before anything is written: the trainer would save the broken weights with the next checkpoint.
        for name in ("loss", "grad_norm"):
            value = _number(logs.get(name))
            if value is not None and not math.isfinite(value):
                raise FloatingPointError(
                    f"the {name} became {value} at step {state.global_step}; the last checkpoint in "
                    f"{args.output_dir} is untouched. Lower train.learning_rate, or use bfloat16 or float32"
                )
        # Of this call alone: a resumed run's earlier steps took no time of this process.
        taken = max(1, state.global_step - self.first_step)
        speed = taken / (time.monotonic() - self.began)
        numbers = {
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": _number(logs.get("grad_norm")),
            "epoch": logs.get("epoch"),
            "samples_per_second": round(speed * self.samples_per_step, 2),
            "eta_seconds": round((state.max_steps - state.global_step) / speed, 1),
        }
        if self.tracker is not None:
            self.tracker.log(numbers, step=state.global_step)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}, {numbers['samples_per_second']:.0f} samples/s")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


class CompleteCheckpointCallback(TrainerCallback):
    """Marks a checkpoint once every rank has written its part; only marked ones are resumed from."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Write the mark.

        Raises:
            FloatingPointError: if a trained weight is NaN or infinite; the checkpoint stays unmarked.
        """
        check_finite_weights(model)
        # The mark says that every rank's part is there, so rank 0 waits for all of them.
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            partial = folder / f"{COMPLETE}.partial"
            partial.write_text(json.dumps({"step": state.global_step, "settings": self.settings}))
            partial.rename(folder / COMPLETE)  # renamed, so that no half-written mark counts


def check_finite_weights(model: torch.nn.Module) -> None:
    """Check what trains, or this rank's piece of it; raises FloatingPointError if any weight is not finite."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        piece = getattr(parameter, "ds_tensor", parameter)  # under ZeRO-3 the parameter itself is empty between layers
        if not bool(torch.isfinite(piece).all()):
            raise FloatingPointError(f"{name} became NaN or infinite; it is not saved. Lower train.learning_rate")


def _number(value: Any) -> float | None:
    """Return a logged value as a number; a gradient norm may come as a tensor."""
    return None if value is None else float(value)
