"""Float32 that is float32: what decides a selection must not depend on the run's mixed-precision settings."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The switches belong to the process: whoever is inside is counted, and what was set before is kept until all have left.
_lock = threading.Lock()
_inside = 0
_before: list[tuple[Any, str]] = []  # a switch, None for PyTorch's one old switch, and its setting


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Switch autocast and TF32 (or bfloat16) matrix products off while the context is open.

    With ten bits of mantissa the same image would keep other tokens in a process that has them on. Autocast belongs
    to the thread. The switches of matrix products belong to the process: the first thread that enters sets them and the
    last one that leaves restores them, so meanwhile other threads compute more exactly than they asked for.
    """
    _enter()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _leave()


def _enter() -> None:
    global _inside
    with _lock:
        _inside += 1
        if _inside > 1:
            return
        for knob in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
            if hasattr(knob, "fp32_precision"):
                _before.append((knob, knob.fp32_precision))
                knob.fp32_precision = "ieee"
        if not _before:  # PyTorch before 2.9 has one switch for all of them
            _before.append((None, torch.get_float32_matmul_precision()))
            torch.set_float32_matmul_precision("highest")


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if _inside:
            return
        for knob, value in _before:
            if knob is None:
                torch.set_float32_matmul_precision(value)
            else:
                knob.fp32_precision = value
        _before.clear()
