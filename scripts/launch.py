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

ROOT = Path(prunetune.__file__).resolve().parents[1]


def launch_recalibration(file: str | None, overrides: list[str]) -> int:
    """Launch :mod:`prunetune.train.recalibrate` on ``devices`` devices (default: all) and return its exit status.

    Raises:
        ConfigError: if the configuration is wrong; nothing is launched then.
    """
    config = load_config(RecalibrateConfig, file, overrides)
    devices = config.devices or max(torch.cuda.device_count(), 1)
    line = launch_line(devices, ["--config", file, *overrides] if file else overrides)
    print(" ".join(line), flush=True)
    return subprocess.run(line, env=launch_environment(devices), check=False).returncode


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
