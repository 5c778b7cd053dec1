"""Several processes on one evaluation, as ``torchrun`` or ``deepspeed`` start them."""

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
    def chief(self) -> bool:
        """Whether this process prints and writes what there is one of."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all are here."""
        if self.world > 1:
            torch.distributed.barrier()

    def leave(self) -> None:
        """Part; the last thing a rank does."""
        if self.world > 1:
            torch.distributed.destroy_process_group()


def join_ranks() -> Ranks:
    """Return this process's place from the launcher's environment, and meet the others over gloo."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    ranks = Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0")), world)
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    return ranks
