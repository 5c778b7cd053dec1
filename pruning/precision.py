"""Float32 that is float32: what decides a selection must not depend on the run's mixed-precision settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Switch autocast and TF32 (or bfloat16) matrix products off while the context is open.

    Trainers switch them on for the whole process; evaluation does not. With ten bits of mantissa the same picture would
    keep other tokens in training than in inference.
    """
    knobs = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    knobs = [knob for knob in knobs if hasattr(knob, "fp32_precision")]
    before = [knob.fp32_precision for knob in knobs]
    legacy = None if knobs else torch.get_float32_matmul_precision()
    try:
        for knob in knobs:
            knob.fp32_precision = "ieee"
        if legacy is not None:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for knob, value in zip(knobs, before, strict=True):
            knob.fp32_precision = value
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
