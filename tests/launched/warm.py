"""Ranks that are forks of a process that has imported everything: importing takes several times as long as a small run.

They find what a launcher tells its ranks, under a process that stands for it. The launchers themselves are started in
tests/test_recalibrate.py and tests/test_recalibrate_cluster.py.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from prunetune.train.launchers import free_port

TESTS = Path(__file__).resolve().parents[1]
TIMEOUT = 600.0
IMPORTED = [
    "prunetune.cli",
    "prunetune.train.recalibrate",
    "prunetune.tiny_world.recipe",
    "datasets",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "transformers.models.llava.modeling_llava",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "launched.warm",
]
"""What a rank would import otherwise; DeepSpeed and transformers import the half of it when they are first used."""


def in_ranks(
    world: int, function: Callable[..., Any], *arguments: Any, environment: dict[str, str], cwd: Path
) -> tuple[int, str]:
    """Call a function in every rank, and return the exit status of the first that failed, or 0, and what they printed.

    Args:
        world: how many ranks; a single one is told nothing, as if no launcher had started it.
        function: of a module, with nothing that can't be pickled.
        arguments: of the function.
        environment: of the ranks. What reads it while it is imported has read that of the first call.
        cwd: where the ranks stand.
    """
    if world > 1:
        environment = {**environment, "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(free_port())}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "printed"
        process = _context().Process(target=_launch, args=(world, function, arguments, environment, cwd, file))
        found = {**environment, "PYTHONPATH": os.pathsep.join([str(TESTS), environment.get("PYTHONPATH", "")])}
        with mock.patch.dict(os.environ, found, clear=True):
            process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError(f"the ranks did not end within {TIMEOUT:g} s:\n{file.read_text()[-4000:]}")
        return process.exitcode, file.read_text()


@cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def _launch(
    world: int, function: Callable, arguments: tuple, environment: dict[str, str], cwd: Path, file: Path
) -> NoReturn:
    """Start the ranks and wait; when one of them fails, the others are told to end, as launchers do."""
    multiprocessing.set_start_method(None, force=True)  # of data loading processes: the usual one
    os.setsid()
    os.chdir(cwd)
    printed = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.environ.clear()
    os.environ.update(environment)
    left = set()
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _run(rank if world > 1 else None, function, arguments)
        left.add(pid)
    status = 0
    while left:
        pid, code = os.wait()
        left.discard(pid)
        if code and not status:
            status = os.waitstatus_to_exitcode(code)
            for other in left:
                os.kill(other, signal.SIGTERM)
    os._exit(status if status >= 0 else 128 - status)


def _run(rank: int | None, function: Callable, arguments: tuple) -> NoReturn:
    """Run the function as a script is run: to its exit status, and with what it has left for its end."""
    if rank is not None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    status = 0
    try:
        function(*arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
