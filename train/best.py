"""While training: the held-out loss, the best adapter so far, and when to stop; a killed run goes on with all of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prunetune.configs import ConfigError, RecalibrateConfig
from prunetune.data_recipes import RecipeData
from prunetune.models import Arm, write_adapter
from prunetune.train.callbacks import NothingToTrain
from prunetune.train.record import run_record
from prunetune.train.start_from import Start
from prunetune.train.tracking import Tracker
from prunetune.train.trainer import gathered_projector

PROGRESS = "held_out.json"
BEST = "held_out_best.safetensors"
"""In a checkpoint, beside each other: where the run stands, and the best projector so far."""


@dataclass
class Progress:
    """Where the held-out loss stands.

    Attributes:
        loss: the lowest; None before the first evaluation.
        step: of the lowest.
        since: evaluations since then, none of which was lower.
        last: the loss of the last evaluation.
        tensors: the projector of the lowest, on rank 0 alone.
    """

    loss: float | None = None
    step: int = 0
    since: int = 0
    last: float | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def take(self, loss: float, step: int) -> bool:
        """Note an evaluation, and return whether it is the best so far; of two equal ones the first stays."""
        self.last = loss
        if self.loss is not None and loss >= self.loss:
            self.since += 1
            return False
        self.loss, self.step, self.since = loss, step, 0
        return True

    def record(self) -> dict[str, Any]:
        """Return what a record says of it."""
        return {"best_loss": self.loss, "best_step": self.step, "last_loss": self.last, "evaluations_since": self.since}

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint that is not marked complete yet."""
        if self.tensors:
            save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / BEST)
        values = asdict(self)
        del values["tensors"]
        (folder / PROGRESS).write_text(json.dumps(values))

    @classmethod
    def read(cls, folder: Path | None) -> Progress:
        """Return what a checkpoint holds; a fresh one if there is no checkpoint.

        Raises:
            ConfigError: if the checkpoint has none.
        """
        if folder is None:
            return cls()
        try:
            progress = cls(**json.loads((folder / PROGRESS).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{folder / PROGRESS} can't be read ({error}), so it is not known which projector was best; use "
                "another output folder, or set train.resume to never to start over"
            ) from None
        if (folder / BEST).exists():
            progress.tensors = load_file(folder / BEST)
        return progress


@dataclass(frozen=True)
class BestAdapter:
    """The folder ``best/`` of a run: the adapter of the lowest held-out loss, whole or not at all.

    Attributes:
        config: the run's.
        data: what it trains on.
        held: what the loss is measured on.
        arm: what is trained.
        peft_model: the same, wrapped.
        tracker: the run's, on rank 0.
        features: the seal of the feature cache that it is trained from.
        begins: the adapter whose projector training began with.
        loss: what the held-out loss is: the cross entropy of answers, ``ce``, or an objective without labels.
    """

    config: RecalibrateConfig
    data: RecipeData
    held: RecipeData
    arm: Arm
    peft_model: PeftModel
    tracker: Tracker | None
    features: str | None = None
    begins: Start | None = None
    loss: str = "ce"

    @property
    def folder(self) -> Path:
        """Where it is."""
        return Path(self.config.output) / "best"

    def tensors(self) -> dict[str, Tensor]:
        """Return the projector as it is now; all ranks call this."""
        return gathered_projector(self.peft_model)

    def write(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Write the adapter with its record, in place of an older one."""
        record = run_record(
            self.config, self.data, self.arm, tensors, progress.step, self.tracker, self.features, self.begins
        )
        # Of that step alone, so that the adapter is the same whenever it is written again.
        record["held_out"] = self._slice() | {"best_loss": progress.loss, "best_step": progress.step}
        write_adapter(self.folder, tensors, self.peft_model, record)

    def record(self, progress: Progress) -> dict[str, Any]:
        """Return what the record of the last adapter says of the held-out loss."""
        return self._slice() | progress.record()

    def _slice(self) -> dict[str, Any]:
        told = {"samples": len(self.held), "hash": self.held.content_hash}
        return told if self.loss == "ce" else {**told, "loss": self.loss}  # records of answers stay, to the byte


class HeldOutCallback(TrainerCallback):
    """Measures the held-out loss before the first step, every ``every`` steps and after the last; all ranks call it.

    It comes before the callback that marks checkpoints complete, since it writes into them.

    Args:
        measure: returns the loss, the same on every rank.
        best: where the best adapter goes.
        log: takes numbers and their step; None on the ranks that do not log.
        every: optimizer steps between evaluations.
        patience: evaluations without a lower loss after which training stops; None never stops it.
        progress: of the checkpoint that is gone on from.

    Attributes:
        stopped_early: whether patience ran out.
    """

    def __init__(
        self,
        measure: Callable[[], float],
        best: BestAdapter,
        log: Callable[[dict[str, Any], int], None] | None,
        every: int,
        patience: int | None,
        progress: Progress,
    ) -> None:
        self.measure, self.best, self.log = measure, best, log
        self.every, self.patience, self.progress = every, patience, progress
        self.stopped_early = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure the projector as it is; of a run that goes on, write its best adapter again.

        Raises:
            NothingToTrain: if patience had run out as the checkpoint was written.
        """
        if state.global_step == 0:
            self._evaluate(state)
            return
        # A killed run may have written one of a later step, which will come again.
        if state.is_world_process_zero and self.progress.tensors:
            self.best.write(self.progress.tensors, self.progress)
        if self._ran_out():
            self.stopped_early = True
            raise NothingToTrain

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure where it is due, and stop with a checkpoint once patience has run out."""
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        self._evaluate(state)
        if self._ran_out():
            self.stopped_early = True
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write where it stands into the checkpoint."""
        if state.is_world_process_zero:
            self.progress.write(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def _evaluate(self, state: TrainerState) -> None:
        step = state.global_step
        loss = self.measure()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the held-out loss became {loss} at step {step}; the last checkpoint is untouched. Lower "
                "train.learning_rate, or use bfloat16 or float32"
            )
        is_best = self.progress.take(loss, step)
        tensors = self.best.tensors() if is_best else {}
        if not state.is_world_process_zero:
            return
        if is_best:
            self.progress.tensors = dict(tensors)
            self.best.write(tensors, self.progress)
        if self.log is not None:
            self.log({"held_out_loss": loss, "best_held_out_loss": self.progress.loss}, step)

    def lines(self) -> list[str]:
        """Return how it ended, for people."""
        progress = self.progress
        if progress.loss is None or progress.last is None:
            return []
        what = "" if self.best.loss == "ce" else f" ({self.best.loss})"
        told = [f"lowest held-out loss{what} {progress.loss:.4f} at step {progress.step}, the last {progress.last:.4f}"]
        if self.stopped_early:
            told.append(f"stopped early: the last {progress.since} were not lower (train.patience)")
        return [*told, f"the adapter of step {progress.step}: {self.best.folder}"]

    def _ran_out(self) -> bool:
        return self.patience is not None and self.progress.since >= self.patience
