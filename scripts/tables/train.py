"""The recalibrations of a table, one after another on the devices of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from prunetune.configs import TableConfig
from prunetune.outputs import OutputFolder
from prunetune.scripts.launch import LOG, launch_several
from prunetune.scripts.tables.cells import Training
from prunetune.scripts.tables.state import is_trained, remade
from prunetune.train.stopping import INTERRUPTED, REQUEUE


def train_missing(
    config: TableConfig, trainings: Sequence[Training], folder: OutputFolder
) -> tuple[dict[str, str], int]:
    """Run what is not trained yet, in as few launches as may be; one that fails does not stop the others.

    Args:
        config: the table's.
        trainings: of the table.
        folder: the table's, open.

    Returns:
        Why trainings failed, by name; and a signal's exit status, 0 if none came.
    """
    failed: dict[str, str] = {}
    left = [training for training in trainings if not is_trained(training)]
    while left:
        devices = _devices(left[0])
        # Those with as many devices share one launch, whose processes import everything once.
        batch = [training for training in left if _devices(training) == devices]
        runs = [["--config", one.file, *one.overrides, *remade(config, one)] for one in batch]
        status = launch_several(devices, runs, folder, batch[0].config.grace)
        if status in (REQUEUE, INTERRUPTED):
            return failed, status
        left = [training for training in left if not is_trained(training)]
        unfinished = [training for training in batch if training in left]
        if unfinished:  # the first of them ended the launch; the next one goes on with the others
            first = unfinished[0]
            left.remove(first)
            log = Path(folder.path) / LOG
            failed[first.name] = f"the recalibration ended with status {status}; its last lines are above and in {log}"
    return failed, 0


def _devices(training: Training) -> int:
    return training.config.devices or max(torch.cuda.device_count(), 1)
