"""Several processes on one job, as ``torchrun`` or ``deepspeed`` start them."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from prunetune.errors import PrunetuneError
from prunetune.outputs import OutputError, OutputFolder, writing
from prunetune.plugins import PluginError

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

    def check_same(self, plugins: list[dict[str, Any]]) -> None:
        """Check that every rank runs the same plug-ins, once the ranks have met.

        Args:
            plugins: what :func:`prunetune.plugins.plugin_records` says on this rank.

        Raises:
            PluginError: on every rank, naming the first plug-in that differs and both versions.
        """
        if self.world == 1:
            return
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, {plugin["name"]: plugin for plugin in plugins})
        for rank, others in enumerate(found):
            for name in sorted({*found[0], *others}):
                mine, theirs = found[0].get(name), others.get(name)
                if mine != theirs:
                    told = f"rank 0 has {_told(mine)}, rank {rank} {_told(theirs)}"
                    raise PluginError(f"plug-in {name!r} differs between ranks: {told}; install the same on every host")

    @contextmanager
    def open_output(self, folder: OutputFolder) -> Iterator[None]:
        """Open an output folder on rank 0 for all; the others go on once it is open.

        Raises:
            OutputError: on every rank, if it can't be opened.
        """
        error: list[PrunetuneError | None] = [None]
        with ExitStack() as stack:
            stack.enter_context(writing(folder.path))
            if self.is_zero:
                try:
                    stack.enter_context(folder)
                except PrunetuneError as failure:
                    error[0] = failure
            # Nobody writes before rank 0 has found that the folder may be written to.
            told: list[Any] = [str(error[0]) if error[0] is not None else None]
            if self.world > 1:
                torch.distributed.broadcast_object_list(told, src=0)
            if told[0] is not None:
                raise error[0] or OutputError(told[0])
            yield

    def destroy(self) -> None:
        """Destroy the process group; the last thing a rank does."""
        if self.world > 1:
            torch.distributed.destroy_process_group()


def _told(plugin: dict[str, Any] | None) -> str:
    if plugin is None:
        return "none"
    return f"version {plugin['version'] or 'unknown'} (source {plugin['sha256'][:8]})"


def launched_ranks() -> Ranks:
    """Return this process's place from the launcher's environment; without a launcher it is the only one."""
    names = ("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")
    return Ranks(*(int(os.environ.get(name, alone)) for name, alone in names))


@contextmanager
def first_on_rank_zero(ranks: Ranks) -> Iterator[None]:
    """Run what is within on rank 0 first, and then on the others, which find what it kept."""
    together = ranks.world > 1 and torch.distributed.is_initialized()
    if together and not ranks.is_zero:
        torch.distributed.barrier()
    yield
    if together and ranks.is_zero:
        torch.distributed.barrier()


def leave_at_exit() -> None:
    """Leave, when the process ends, a group that somebody else began and may not leave.

    A thread of gloo that is still there when the interpreter is gone ends the process with SIGABRT, after all its work.
    """
    atexit.register(_leave)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def join_ranks() -> Ranks:
    """Return this process's place, and meet the others over gloo."""
    ranks = launched_ranks()
    if ranks.world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    return ranks
