"""Vision signals read while the stock model encodes its images: hooks on one module each, nothing else computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def record_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the first positional input of every call of ``module`` while the context is open."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(args[0] if args else next(iter(kwargs.values())))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def record_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the output of every call of ``module`` while the context is open."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def record_cls_attention(attention: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collect [CLS]-to-patch attention (B, H, N) of every call of a ViT self-attention; None collects nothing.

    One attention row is recomputed from the module's own projections, so the model keeps its fast attention kernel.
    """
    seen: list[Tensor] = []
    if attention is None:
        yield seen
        return

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        with torch.no_grad():
            seen.append(cls_attention(module, hidden))

    handle = attention.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def cls_attention(attention: Any, hidden: Tensor) -> Tensor:
    """Return the softmaxed attention of token 0 to the patches, (B, H, N) float32, for CLIP-like self-attention.

    Args:
        attention: a module with ``q_proj``, ``k_proj``, ``num_heads`` and ``scale``.
        hidden: (B, 1 + N, C) the module's input, [CLS] first.
    """
    batch, tokens, _ = hidden.shape
    query = attention.q_proj(hidden[:, :1]).view(batch, 1, attention.num_heads, -1)
    key = attention.k_proj(hidden).view(batch, tokens, attention.num_heads, -1)
    logits = torch.einsum("bqhd,bkhd->bhk", query.float(), key.float()) * attention.scale
    return logits.softmax(dim=-1)[:, :, 1:]


def image_keys(pixels: Tensor) -> Tensor:
    """Return an int64 fingerprint (B,) of each item's pixels (B, ...); integer sums, so the same in any batch.

    The first axis counts items. Half-precision pixels are widened exactly, so they keep their own fingerprint.
    """
    bits = pixels.float().flatten(1).contiguous().view(torch.int32).long()
    place = torch.arange(bits.shape[1], device=bits.device) % 8191 + 1
    return (bits * place).sum(dim=1) & ((1 << 31) - 1)
