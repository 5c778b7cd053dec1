"""The greedy loops of :mod:`pruning.ops.greedy` as Triton kernels: one program per item runs all K steps on the device.

The plain version is the oracle (tests run these kernels in Triton's interpreter) and the fallback where Triton is
absent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without it
    triton = None

LONGEST = 8192
"""More tokens per item than this do not fit one program; the plain version takes over."""


def usable(matrix: Tensor) -> bool:
    """Return whether the kernels can run on this (B, N, N) tensor."""
    return triton is not None and matrix.is_cuda and matrix.shape[-1] <= LONGEST


def pick_spread(matrix: Tensor, state: Tensor, keep: int, update: str) -> Tensor:
    """Return what :func:`pruning.ops.greedy.pick_spread` returns; tokens with state -inf are never picked."""
    batch, count = state.shape
    picks = torch.zeros(batch, keep, dtype=torch.long, device=state.device)
    if batch and keep:
        with torch.cuda.device_of(matrix):
            _spread[(batch,)](
                matrix.contiguous(), state.contiguous(), picks, count, keep, MINIMUM=update == "minimum", **_size(count)
            )
    return picks


def pick_determinantal(
    similarity: Tensor, quality: Tensor, volume: Tensor, fill: Tensor, floor: Tensor, keep: int
) -> Tensor:
    """Return what :func:`pruning.ops.greedy.pick_determinantal` returns.

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
    if batch and keep:
        factors = torch.empty(batch, keep, count, dtype=torch.float32, device=quality.device)
        vectors = [vector.contiguous() for vector in (quality, volume, fill, floor)]
        with torch.cuda.device_of(similarity):
            _determinantal[(batch,)](similarity.contiguous(), *vectors, factors, picks, count, keep, **_size(count))
    return picks


def _size(count: int) -> dict[str, Any]:
    block = max(triton.next_power_of_2(count), 32)
    # Fused multiply-adds would round differently from the plain version, and a last bit can decide a pick.
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16), "enable_fp_fusion": False}


if triton is not None:

    @triton.jit
    def _spread(matrix, state, picks, count, keep, MINIMUM: tl.constexpr, BLOCK: tl.constexpr):
        item = tl.program_id(0).to(tl.int64)
        place = tl.arange(0, BLOCK)
        inside = place < count
        now = tl.load(state + item * count + place, mask=inside, other=float("-inf"))
        for step in range(keep):
            pick = tl.argmax(now, axis=0)  # of equals the lowest
            tl.store(picks + item * keep + step, pick.to(tl.int64))
            row = tl.load(matrix + (item * count + pick) * count + place, mask=inside, other=float("-inf"))
            if MINIMUM:  # noqa: SIM108
                now = tl.minimum(now, row)
            else:
                now = now + row
            now = tl.where(place == pick, float("-inf"), now)

    @triton.jit
    def _determinantal(
        similarity, quality, volume, fill, floor, factors, picks, count, keep, BLOCK: tl.constexpr
    ):  # fmt: skip
        item = tl.program_id(0).to(tl.int64)
        place = tl.arange(0, BLOCK)
        inside = place < count
        each = tl.load(quality + item * count + place, mask=inside, other=0.0)
        left = tl.load(volume + item * count + place, mask=inside, other=float("-inf"))
        last = tl.load(fill + item * count + place, mask=inside, other=float("-inf"))
        none = tl.load(floor + item)
        factors += item * keep * count
        for step in range(keep):
            pick = tl.argmax(tl.where(left > none, left, tl.minimum(left, last)), axis=0)
            tl.store(picks + item * keep + step, pick.to(tl.int64))
            scale = tl.load(quality + item * count + pick)
            row = tl.load(similarity + (item * count + pick) * count + place, mask=inside, other=0.0) * each * scale
            for known in range(step):
                line = factors + known * count
                row -= tl.load(line + pick) * tl.load(line + place, mask=inside, other=0.0)
            rest = tl.sum(tl.where(place == pick, left, 0.0), axis=0)
            # the constant is a normal float32: a smaller one would be taken as float64, which div_rn refuses
            row = tl.where(rest > none, tl.div_rn(row, tl.sqrt_rn(tl.maximum(rest, 1.2e-38))), 0.0)
            tl.store(factors + step * count + place, row, mask=inside)
            tl.debug_barrier()  # the next step reads this row, each thread also what others wrote
            left = tl.where(place == pick, float("-inf"), left - row * row)
