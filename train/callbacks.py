"""What happens around the optimizer steps: numbers, a progress bar, stopping, and the mark of a complete checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prunetune.configs import ConfigError
from prunetune.screen import SCREEN, say
from prunetune.train.checkpoints import COMPLETE, Mark, file_hashes
from prunetune.train.measured import RunNumbers, in_a_line
from prunetune.train.stopping import StopRequest
from prunetune.train.tracking import Tracker


class NumbersCallback(TrainerCallback):
    """Logs loss, speed and ETA, draws the progress bar, and stops on a loss that is not finite.

    In float16 DeepSpeed skips a step whose gradients overflow, on purpose: it lowers the loss scale and goes on. Such
    steps are counted; DeepSpeed stops by itself once the scale can't fall further.

    Args:
        tracker: the run's, on rank 0; the other ranks have none and only stop.
        samples_per_step: over all ranks.
        skips: returns how many steps DeepSpeed has skipped so far; None where it skips none on purpose.
        measured: the run's own numbers, which every row gets and whose summary is told at the end; None measures
            nothing beside speed.

    Attributes:
        skipped: steps without an update, those before a resumed checkpoint included.
    """

    def __init__(
        self,
        tracker: Tracker | None,
        samples_per_step: int,
        skips: Callable[[], int] | None = None,
        measured: RunNumbers | None = None,
    ) -> None:
        self.tracker = tracker
        self.measured = measured
        self.samples_per_step = samples_per_step
        self.skips = skips
        self.skipped = 0
        self.bar: tqdm | None = None
        self.began = 0.0
        self.first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock and the bar."""
        self.began, self.first_step = time.monotonic(), state.global_step
        if self.measured is not None:
            self.measured.begin()
        self.skipped = self.skips() if self.skips is not None else 0
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
        values = {"loss": _number(logs["loss"]), "grad_norm": _number(logs.get("grad_norm"))}
        if self._skipped_some():
            values["grad_norm"] = None  # of a step that is not taken; the loss still has to be a number
        # Before anything is written: the trainer would save the broken weights with the next checkpoint.
        for name, value in values.items():
            if value is not None and not math.isfinite(value):
                raise FloatingPointError(
                    f"the {name} became {value} at step {state.global_step}; the last checkpoint in "
                    f"{args.output_dir} is untouched. Lower train.learning_rate, or use bfloat16 or float32"
                )
        # Of this call alone: a resumed run's earlier steps took no time of this process.
        taken = max(1, state.global_step - self.first_step)
        speed = taken / (time.monotonic() - self.began)
        numbers: dict[str, Any] = {
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": values["grad_norm"],
            "epoch": logs.get("epoch"),
            "samples_per_second": round(speed * self.samples_per_step, 2),
            "eta_seconds": round((state.max_steps - state.global_step) / speed, 1),
        }
        numbers |= {name: value for name, value in logs.items() if name.startswith("loss_")}  # of each term
        if self.skips is not None:
            numbers["skipped_steps"] = self.skipped
        if self.measured is not None:
            numbers |= self.measured.row()
        if self.tracker is not None:
            self.tracker.log(numbers, step=state.global_step)
        if self.bar is not None:
            skipped = f", {self.skipped} steps skipped" if self.skipped else ""
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}, {numbers['samples_per_second']:.0f} samples/s{skipped}")

    def _skipped_some(self) -> bool:
        """Return whether steps were skipped since the last row, and count them."""
        before = self.skipped
        self.skipped = self.skips() if self.skips is not None else 0
        return self.skipped > before

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar, and say and keep what the run measured of itself."""
        if self.bar is not None:
            self.bar.close()
        if self.measured is None:
            return
        summary = self.measured.summary()
        if self.tracker is not None:
            self.tracker.summarize("numbers", summary)
            say(in_a_line(summary))


class NothingToTrain(Exception):
    """Everything is loaded and no step is to be taken."""


class StopCallback(TrainerCallback):
    """Ends training at the last step, which the trainer would step over, and where a rank was told to stop.

    Args:
        request: this rank's; the ranks agree after every optimizer step, so that all of them stop at the same one.
        steps: of the whole run.

    Attributes:
        stopped: whether training ended before its last step, with a checkpoint of the step that it ended at.
    """

    def __init__(self, request: StopRequest, steps: int) -> None:
        self.request = request
        self.steps = steps
        self.stopped = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave before the first step if there is none to take; weights and optimizer are loaded by now.

        Raises:
            NothingToTrain: always on all ranks at once.
        """
        if state.global_step >= min(self.steps, state.max_steps):
            raise NothingToTrain
        if self._any_rank_was_asked(args):
            self.stopped = True
            raise NothingToTrain

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take a checkpoint and stop, if any rank was told to."""
        if state.global_step < state.max_steps and self._any_rank_was_asked(args):
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def _any_rank_was_asked(self, args: TrainingArguments) -> bool:
        asked = torch.tensor([int(self.request.asked.is_set())], device=args.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return bool(asked.item())


class CompleteCheckpointCallback(TrainerCallback):
    """Marks a checkpoint once every rank has written its part; only marked ones are resumed from.

    Args:
        settings: of the run, see :class:`~prunetune.train.checkpoints.Mark`.
        made_with: the same; only rank 0 needs to know.
    """

    def __init__(self, settings: dict[str, Any], made_with: dict[str, Any]) -> None:
        self.settings = settings
        self.made_with = made_with

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Write the mark.

        Raises:
            FloatingPointError: if a trained weight is NaN or infinite; the checkpoint stays unmarked.
            ConfigError: if not every rank wrote into the folder that rank 0 sees.
        """
        check_finite_weights(model)
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        written = _written_by_all(folder)  # the mark says that every rank's part is there, so rank 0 waits for them
        if state.is_world_process_zero:
            _wait_for(written, folder)
            Mark(state.global_step, self.settings, self.made_with, file_hashes(folder)).write(folder / COMPLETE)


def _written_by_all(folder: Path) -> set[str]:
    """Return every file that some rank sees in a folder, which is at least what it wrote itself."""
    mine = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if not torch.distributed.is_initialized():
        return mine
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return set().union(*found)


def _wait_for(written: set[str], folder: Path, patience: float = 90) -> None:
    """Wait until this host sees what the others wrote: NFS may show a folder as it was a minute ago.

    Raises:
        ConfigError: if it never does.
    """
    deadline = time.monotonic() + patience
    while missing := [name for name in sorted(written) if not (folder / name).exists()]:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"rank 0 does not see {folder / missing[0]}, which another rank wrote; output must be a folder that "
                "all hosts share"
            )
        time.sleep(1)


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
