"""Which checkpoints of a run stay."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prunetune.outputs import CHECKPOINT_FILES, delete
from prunetune.train.checkpoints import COMPLETE

KEPT = 2


class KeepNewestCallback(TrainerCallback):
    """Deletes checkpoints that are older than the newest two complete ones.

    Trainer's own limit takes every folder called ``checkpoint-...`` for a checkpoint, somebody's backup included.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Delete them, once the new one is complete."""
        if state.is_world_process_zero:
            drop_old_checkpoints(Path(str(args.output_dir)))


def drop_old_checkpoints(output: Path) -> None:
    """Delete the files of ``checkpoint-N`` that a run wrote, for every N below those of the newest complete ones."""
    by_step = {}
    for folder in output.glob("checkpoint-*"):
        if re.fullmatch("checkpoint-[0-9]+", folder.name) and folder.is_dir():
            by_step[int(folder.name.removeprefix("checkpoint-"))] = folder
    complete = sorted(step for step, folder in by_step.items() if (folder / COMPLETE).exists())
    if len(complete) <= KEPT:
        return
    for step, folder in by_step.items():
        if step < complete[-KEPT]:
            delete(folder, CHECKPOINT_FILES, first=COMPLETE)
            with suppress(OSError):  # somebody's file is in it
                folder.rmdir()
