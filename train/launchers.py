"""Who started this process: `deepspeed`, `torchrun`, `srun`, or nobody but the user."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import MutableMapping


def complete_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what ``deepspeed`` and ``torchrun`` set for their ranks where another launcher, or none, has not.

    ``srun`` says which task of its step this is; without any launcher there is one rank, and its port is a free one.
    """
    if "RANK" in environment:
        return
    # Of the step and not of the job: a batch script that starts one process has the job's number of tasks as well.
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1:
        values = _of_srun(environment, tasks)
    else:
        values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        values["MASTER_PORT"] = str(free_port())
    for name, value in values.items():
        environment.setdefault(name, value)


def _of_srun(environment: MutableMapping[str, str], tasks: int) -> dict[str, str]:
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        # The same on all hosts, and another one for each job that may share a host.
        "MASTER_PORT": str(20_000 + int(environment["SLURM_JOB_ID"]) % 10_000),
    }


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: ``gpu03`` of ``gpu[03-05,9],login``."""
    prefix, first, rest = re.fullmatch(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,]*))?.*", nodes).groups()  # type: ignore[union-attr]
    return f"{prefix}{first or ''}{rest or ''}"


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
