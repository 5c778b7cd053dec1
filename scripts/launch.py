"""Starting the DeepSpeed launcher for a recalibration, and handing signals on to its ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

import prunetune
from prunetune.configs import RecalibrateConfig, load_config
from prunetune.outputs import RECALIBRATION, OutputFolder, write_text
from prunetune.screen import LossyLog, say, show_and_log
from prunetune.train.launchers import free_port
from prunetune.train.preflight import check_before_launch
from prunetune.train.stopping import INTERRUPTED, REQUEUE, STOP_SIGNALS

ROOT = Path(prunetune.__file__).resolve().parents[1]
LOG = "launch.log"
"""In the output folder: what DeepSpeed, W&B and the other libraries print."""
RUNS = "runs.json"
"""Beside it: the arguments of several recalibrations that one launch runs."""
GRACE = 120.0
"""Seconds between a signal and the end of ranks that have not stopped by themselves."""
REPEAT = 2.0
"""Seconds between two tellings: a rank that is only being started hears the next one."""


def launch_recalibration(file: str | None, overrides: list[str]) -> int:
    """Launch :mod:`prunetune.train.recalibrate` on ``devices`` devices (default: all) and return its exit status.

    Raises:
        ConfigError, DataError, PruningError: if the configuration is wrong, or names what is not there; nothing is
            launched then.
    """
    config = load_config(RecalibrateConfig, file, overrides)
    check_before_launch(config)
    devices = config.devices or max(torch.cuda.device_count(), 1)
    arguments = ["--config", file, *overrides] if file else overrides
    with OutputFolder(config.output, RECALIBRATION, config.overwrite, reads=(config.model.path,)) as folder:
        return launch(devices, arguments, folder, config.grace)


def launch(devices: int, arguments: list[str], folder: OutputFolder, grace: float = GRACE) -> int:
    """Run the trainer on some devices, as :func:`_launched`."""
    return _launched(devices, "prunetune.train.recalibrate", [*arguments, "--marked"], folder, grace)


def launch_several(devices: int, runs: list[list[str]], folder: OutputFolder, grace: float = GRACE) -> int:
    """Run several recalibrations one after another in the same ranks, as :func:`_launched`; ``runs`` are arguments."""
    file = folder.path / RUNS
    write_text(file, json.dumps([[*arguments, "--marked"] for arguments in runs], indent=1) + "\n")
    return _launched(devices, "prunetune.train.several", [str(file)], folder, grace)


def _launched(devices: int, module: str, arguments: list[str], folder: OutputFolder, grace: float) -> int:
    """Run ranks on some devices, show what they say and write the libraries' lines to a log in an open folder.

    Args:
        devices: how many ranks.
        module: what they run.
        arguments: of the module.
        folder: the run's, open.
        grace: seconds between a signal and the end of ranks that have not stopped by themselves.

    Returns:
        The ranks' exit status; ``REQUEUE`` if a signal stopped them, 130 if that was Ctrl-C.

    Raises:
        OutputError: if the log can't be written.
    """
    log = folder.path / LOG
    line = launch_line(devices, arguments, module)
    environment = {**launch_environment(devices), **folder.shared()}
    with log.open("ab", buffering=0) as stream:
        libraries = LossyLog(stream)
        libraries.write(f"{' '.join(line)}\n".encode())
        with _told_to_stop(grace) as told:
            process = told.start(line, environment)
            assert process.stdout is not None  # it is the pipe
            shown = show_and_log(process.stdout, libraries)
            status = told.status(process.wait(), "error" in shown)
    if status not in (0, REQUEUE, INTERRUPTED) and "error" not in shown:
        say("\n".join(["the last lines of the ranks:", *_last_lines(log)]))
    say(
        f"the libraries' messages: {log}"
        + (f" ({libraries.lost:,} bytes could not be written)" if libraries.lost else "")
    )
    return status


class Forwarding:
    """Hands signals on to the ranks, and ends all of them when their time is up.

    DeepSpeed's launcher ends its ranks on SIGTERM, and the process above it dies without telling anyone. So both start
    with these signals held back, in a session of their own, and the ranks alone let them through: the whole group can
    be told. It is told by SIGUSR1, which ends no data loading process either.
    """

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.received: signal.Signals | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._over = threading.Event()

    def start(self, line: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start the launcher with the signals held back, which its ranks inherit until they listen."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._process = subprocess.Popen(
                line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self._process

    def receive(self, number: int, _: Any) -> None:
        """Take a signal of this process; a second Ctrl-C ends everything at once."""
        if self.received is None:
            self.received = signal.Signals(number)
            threading.Thread(target=self._tell, daemon=True).start()
        elif number == signal.SIGINT:
            self._send(signal.SIGKILL)

    def status(self, ended: int, said_why: bool) -> int:
        """Return the exit status of all: a run that was told to stop goes on later, unless it failed or finished."""
        self._over.set()
        if self.received is None or ended == 0 or (said_why and ended != REQUEUE):
            return ended
        return INTERRUPTED if self.received == signal.SIGINT else REQUEUE

    def _tell(self) -> None:
        assert self.received is not None  # it is what began this thread
        say(f"{self.received.name}: the ranks take a checkpoint after this step, within {self.grace:g} s, and stop")
        for _ in range(max(1, round(self.grace / REPEAT))):
            self._send(signal.SIGUSR1)
            if self._over.wait(min(REPEAT, self.grace)):
                return
        say(f"the ranks did not stop within {self.grace:g} s and are ended; the last complete checkpoint is used next")
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):  # they have just ended
                os.killpg(self._process.pid, number)


@contextmanager
def _told_to_stop(grace: float) -> Iterator[Forwarding]:
    """While open, signals that would end this process go to the ranks instead."""
    told = Forwarding(grace)
    before = {}
    for number in [*STOP_SIGNALS, signal.SIGHUP]:
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup a closed terminal ends nothing
            before[number] = signal.signal(number, told.receive)
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def launch_line(devices: int, arguments: list[str], module: str = "prunetune.train.recalibrate") -> list[str]:
    """Return the launcher's command line."""
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(devices)]
    return [*runner, "--master_port", str(free_port()), "--module", module, *arguments]


def launch_environment(devices: int) -> dict[str, str]:
    """Return the environment of the ranks: on a CPU they share its cores instead of fighting for them."""
    environment = dict(os.environ)
    environment.setdefault("PYTHONSAFEPATH", "1")  # a `datasets.py` where the user stands is not the library
    if len(prunetune.__path__) > 1:  # a checkout: the ranks run this one, whichever is installed
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"  # ninja lives there
    return environment


def _last_lines(log: Path, count: int = 20) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-count:]
