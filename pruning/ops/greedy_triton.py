"""The greedy loops of :mod:`prunetune.pruning.ops.greedy` as Triton kernels: one program per item runs all K steps.

The plain version is the oracle (tests run these kernels in Triton's interpreter) and the fallback where Triton is
absent.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without it
    triton = None

LONGEST = 8192
"""More tokens per item than this do not fit one program; the plain version takes over."""
LARGEST_FACTOR = 1_600_000
"""Up to so many numbers in a Cholesky factor, K * N, one program reads it; beyond, the plain version's many do.

An estimate, never measured on a GPU: a step reads all rows before it, 2 K^2 N bytes in all, at about 80 GB/s for
one program, and saves about 40 us of launches. With 576 tokens that is every K, with 2880 tokens K up to 555.
"""


def usable(matrix: Tensor) -> bool:
    """Return whether the kernels can run on this (B, N, N) tensor."""
    return triton is not None and matrix.is_cuda and matrix.shape[-1] <= LONGEST


def pick_spread(
    matrix: Float[Tensor, "B N N"],
    state: Float[Tensor, "B N"],
    keep: int,
    update: str,
) -> Int[Tensor, "B K"]:
    """Return what :func:`prunetune.pruning.ops.greedy.pick_spread` returns; tokens with state -inf are never picked."""
    batch, count = state.shape
    picks = torch.zeros(batch, keep, dtype=torch.long, device=state.device)
    if not batch or not keep:  # a launch of no programs is an error
        return picks
    minimum = update == "minimum"
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device_of(matrix):
        _spread[(batch,)](
            matrix.contiguous(), state.contiguous(), picks, count, keep, MINIMUM=minimum, **_launch_options(count)
        )
    return picks


def pick_determinantal(
    similarity: Float[Tensor, "B N N"],
    quality: Float[Tensor, "B N"],
    volume: Float[Tensor, "B N"],
    fill: Float[Tensor, "B N"],
    floor: Float[Tensor, " B"],
    keep: int,
) -> Int[Tensor, "B K"]:
    """Return what :func:`prunetune.pruning.ops.greedy.pick_determinantal` returns.

    Args:
        similarity: (B, N, N) cosine.
        quality: (B, N).
        volume: (B, N) diagonal of the kernel.
        fill: (B, N) order of the tokens that add no volume, below -1.
        floor: (B,) volume that counts as none.
        keep: K.
    """
    batch, count = quality.shape
    picks = torch.zeros(batch, keep, dtype=torch.long, device=quality.device)
    if not batch or not keep:
        return picks
    factors = torch.empty(batch, keep, count, dtype=torch.float32, device=quality.device)
    with torch.cuda.device_of(similarity):
        _determinantal[(batch,)](
            similarity.contiguous(),
            quality.contiguous(),
            volume.contiguous(),
            fill.contiguous(),
            floor.contiguous(),
            factors,
            picks,
            count,
            keep,
            **_launch_options(count),
        )
    return picks


def _launch_options(count: int) -> dict[str, Any]:
    """Return the block that holds a whole row of ``count`` tokens, and how many warps work on it."""
    block = max(triton.next_power_of_2(count), 32)  # a program holds powers of two alone
    # Fused multiply-adds would round differently from the plain version, and a last bit can decide a pick.
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16), "enable_fp_fusion": False}


if triton is not None:

    @triton.jit
    def _spread(matrix, state, picks, count, keep, MINIMUM: tl.constexpr, BLOCK: tl.constexpr):
        item = tl.program_id(0).to(tl.int64)  # 64 bits: item * count * count passes 2^31 with 259 items of 2880
        index = tl.arange(0, BLOCK)
        inside = index < count
        now = tl.load(state + item * count + index, mask=inside, other=float("-inf"))
        for step in range(keep):
            pick = tl.argmax(now, axis=0)  # ties go to the lower index
            tl.store(picks + item * keep + step, pick.to(tl.int64))
            row = tl.load(matrix + (item * count + pick) * count + index, mask=inside, other=float("-inf"))
            if MINIMUM:  # a branch of the compiler, not of the kernel
                now = tl.minimum(now, row)
            else:
                now = now + row
            now = tl.where(index == pick, float("-inf"), now)

    @triton.jit
    def _determinantal(
        similarity, quality, volume, fill, floor, factors, picks, count, keep, BLOCK: tl.constexpr
    ):  # fmt: skip
        item = tl.program_id(0).to(tl.int64)
        index = tl.arange(0, BLOCK)
        inside = index < count
        each = tl.load(quality + item * count + index, mask=inside, other=0.0)
        left = tl.load(volume + item * count + index, mask=inside, other=float("-inf"))
        last = tl.load(fill + item * count + index, mask=inside, other=float("-inf"))
        none = tl.load(floor + item)
        factors += item * keep * count
        for step in range(keep):
            pick = tl.argmax(tl.where(left > none, left, tl.minimum(left, last)), axis=0)
            tl.store(picks + item * keep + step, pick.to(tl.int64))
            scale = tl.load(quality + item * count + pick)
            row = tl.load(similarity + (item * count + pick) * count + index, mask=inside, other=0.0) * each * scale
            for known in range(step):
                line = factors + known * count
                row -= tl.load(line + pick) * tl.load(line + index, mask=inside, other=0.0)
            rest = tl.sum(tl.where(index == pick, left, 0.0), axis=0)
            # the constant is a normal float32: a smaller one would be taken as float64, which div_rn refuses
            row = tl.where(rest > none, tl.div_rn(row, tl.sqrt_rn(tl.maximum(rest, 1.2e-38))), 0.0)
            tl.store(factors + step * count + index, row, mask=inside)
            tl.debug_barrier()  # the next step reads this row, each thread also what others wrote
            left = tl.where(index == pick, float("-inf"), left - row * row)
