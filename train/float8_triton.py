"""The rounding of :mod:`prunetune.train.float8` as one Triton kernel: a row is read once and written once.

In plain PyTorch it is six passes over the activations in float32, which take about as long on a GPU as the float8
product saves. The plain version is the oracle (a test runs this kernel in Triton's interpreter) and the fallback.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without it
    triton = None

LONGEST = 65536
"""Wider rows do not fit one program; the plain version takes over."""


def usable(values: Tensor) -> bool:
    """Return whether the kernel can run on this (T, C) tensor."""
    return triton is not None and values.is_cuda and 0 < values.shape[1] <= LONGEST and len(values) > 0


def round_rows(values: Tensor, factors: Tensor | None, largest: float, least: float) -> tuple[Tensor, Tensor]:
    """Return what :func:`prunetune.train.float8.round_rows` returns.

    Args:
        values: (T, C) numbers of any floating dtype.
        factors: (C,) float32 that the columns are multiplied by first, or None.
        largest: of the float8 format.
        least: the largest magnitude of a row counts as this at least, so that a row of zeros has a scale.
    """
    rows, width = values.shape
    codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=values.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=values.device)
    block = triton.next_power_of_2(width)
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device_of(values):
        _round_rows[(rows,)](
            values.contiguous(),
            scales if factors is None else factors.contiguous(),  # not read without factors
            codes,
            scales,
            width,
            largest,
            least,
            FACTORS=factors is not None,
            BLOCK=block,
            num_warps=min(16, max(4, block // 1024)),
        )
    return codes, scales


if triton is not None:

    @triton.jit
    def _round_rows(
        values, factors, codes, scales, width, largest, least, FACTORS: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        """Round one row of (T, C)."""
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        numbers = tl.load(values + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        if FACTORS:
            numbers = numbers * tl.load(factors + columns, mask=inside, other=0.0)
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(numbers), axis=0), least), largest)
        rounded = tl.div_rn(numbers, scale).to(tl.float8e4nv)
        tl.store(codes + row * width + columns, rounded, mask=inside)
        tl.store(scales + row, scale)
