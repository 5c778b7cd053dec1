"""Several processes on one job, as ``torchrun`` or ``deepspeed`` start them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch

PATIENCE = timedelta(days=7)
"""How long a rank that is done waits for the slowest."""


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int = 0
    local: int = 0
    world: int = 1

    @property
    def is_zero(self) -> bool:
        """Whether this is rank 0, which prints and writes what there is one of."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all are here."""
        if self.world > 1:
            torch.distributed.barrier()

    def destroy(self) -> None:
        """Destroy the process group; the last thing a rank does."""
        if self.world > 1:
            torch.distributed.destroy_process_group()


def launched_ranks() -> Ranks:
    """Return this process's place from the launcher's environment; without a launcher it is the only one."""
    names = ("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")
    return Ranks(*(int(os.environ.get(name, alone)) for name, alone in names))


def join_ranks() -> Ranks:
    """Return this process's place, and meet the others over gloo."""
    ranks = launched_ranks()
    if ranks.world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    return ranks
