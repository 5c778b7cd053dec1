"""Energy of an NVIDIA GPU, as its driver counts it; nothing is estimated where it does not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

Joules = Callable[[], float]
"""Reads the energy that a GPU has taken since its driver was loaded."""


def energy_counter(device: torch.device) -> tuple[Joules | None, str]:
    """Return what reads a GPU's energy, or None and why it is not measured."""
    if device.type != "cuda":
        return None, "energy is measured on NVIDIA GPUs alone"
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None, "energy is not measured: pynvml is not installed (pip install nvidia-ml-py)"
    try:
        nvml.nvmlInit()
        # By its UUID: the driver's numbers know nothing of CUDA_VISIBLE_DEVICES.
        own = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = nvml.nvmlDeviceGetHandleByUUID(own)
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # of the driver: too old, a virtual or a divided GPU
        return None, f"energy is not measured: the driver does not tell it ({error})"
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000, ""  # millijoules
