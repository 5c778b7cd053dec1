"""Starting the DeepSpeed launcher for a recalibration."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

import prunetune
from prunetune.configs import RecalibrateConfig, load_config
from prunetune.outputs import RECALIBRATION, OutputFolder
from prunetune.screen import say, show_and_log

ROOT = Path(prunetune.__file__).resolve().parents[1]
LOG = "launch.log"
"""In the output folder: what DeepSpeed, W&B and the other libraries print."""


def launch_recalibration(file: str | None, overrides: list[str]) -> int:
    """Launch :mod:`prunetune.train.recalibrate` on ``devices`` devices (default: all) and return its exit status.

    Raises:
        ConfigError: if the configuration is wrong; nothing is launched then.
    """
    config = load_config(RecalibrateConfig, file, overrides)
    devices = config.devices or max(torch.cuda.device_count(), 1)
    folder = OutputFolder(config.output, RECALIBRATION, config.overwrite, reads=(config.model.path,))
    with folder:
        return launch(devices, ["--config", file, *overrides] if file else overrides, folder)


def launch(devices: int, arguments: list[str], folder: OutputFolder) -> int:
    """Run the trainer on some devices, show what it says and write the libraries' lines to a log in its open folder.

    Raises:
        OutputError: if the log can't be written.
    """
    log = folder.path / LOG
    line = launch_line(devices, [*arguments, "--marked"])
    environment = {**launch_environment(devices), **folder.shared()}
    with log.open("ab") as stream:
        stream.write(f"{' '.join(line)}\n".encode())
        stream.flush()
        process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout is not None  # it is the pipe
        try:
            shown = show_and_log(process.stdout, stream)
        except KeyboardInterrupt:
            process.wait()  # the terminal has told the ranks as well; they end on their own
            raise
    status = process.wait()
    if status != 0 and "error" not in shown:
        say("\n".join(["the last lines of the ranks:", *_last_lines(log)]))
    say(f"the libraries' messages: {log}")
    return status


def launch_line(devices: int, arguments: list[str]) -> list[str]:
    """Return the launcher's command line."""
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(devices)]
    return [*runner, "--master_port", str(_free_port()), "--module", "prunetune.train.recalibrate", *arguments]


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
