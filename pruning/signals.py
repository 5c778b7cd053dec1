"""Vision signals read while the stock model encodes its images: hooks on single modules, nothing else computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pruning.precision import exact_float32

QUERIES_AT_ONCE = 128


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
def record_attention(wanted: Mapping[str, nn.Module], has_cls: bool) -> Iterator[dict[str, Tensor]]:
    """Collect attention signals of ViT self-attention modules while the context is open.

    Each is recomputed from the module's own projections, so the model keeps its fast attention kernel.

    Args:
        wanted: for each signal name the module (with ``q_proj``, ``k_proj``, ``num_heads`` and ``scale``) to read.
        has_cls: whether token 0 is [CLS].
    """
    seen: dict[str, Tensor] = {}

    def reader(name: str) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            with torch.no_grad(), exact_float32(hidden.device):
                seen[name] = _READERS[name](module, hidden, int(has_cls))

        return hook

    handles = [module.register_forward_pre_hook(reader(name), with_kwargs=True) for name, module in wanted.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def cls_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return the softmaxed attention of [CLS] to the patches, (B, H, N) float32.

    Args:
        query: (B, H, 1, d) of [CLS].
        key: (B, H, 1 + N, d), [CLS] first.
        scale: factor of the logits.
    """
    logits = (query.float() @ key.float().transpose(-1, -2)) * scale
    return logits.softmax(dim=-1)[:, :, 0, 1:]


def received_attention(query: Tensor, key: Tensor, scale: float, skip: int) -> Tensor:
    """Return the attention that each patch receives, mean over all queries, (B, H, N) float32.

    Queries go through in chunks, so that no full attention map is held.

    Args:
        query: (B, H, skip + N, d).
        key: (B, H, skip + N, d).
        scale: factor of the logits.
        skip: leading tokens that are no patches; they are queries too, but their columns are dropped.
    """
    received = torch.zeros(key.shape[:-1], device=key.device)
    columns = key.float().transpose(-1, -2)
    for rows in query.float().split(QUERIES_AT_ONCE, dim=2):
        received += ((rows @ columns) * scale).softmax(dim=-1).sum(dim=2)
    return received[..., skip:] / query.shape[2]


def _cls_attention(module: Any, hidden: Tensor, skip: int) -> Tensor:
    query = _heads(module.q_proj(hidden[:, :1]), module.num_heads)
    return cls_attention(query, _heads(module.k_proj(hidden), module.num_heads), module.scale)


def _received_attention(module: Any, hidden: Tensor, skip: int) -> Tensor:
    query, key = (_heads(linear(hidden), module.num_heads) for linear in (module.q_proj, module.k_proj))
    return received_attention(query, key, module.scale, skip)


def _keys(module: Any, hidden: Tensor, skip: int) -> Tensor:
    return _heads(module.k_proj(hidden[:, skip:]), module.num_heads).float().mean(dim=1)


def _reader_attention(module: Any, hidden: Tensor, skip: int) -> Tensor:
    query, key = module.q_proj(hidden[:, :1]), module.k_proj(hidden)
    return cls_attention(query[:, None], key[:, None], query.shape[-1] ** -0.5)[:, 0]


def _reader_keys(module: Any, hidden: Tensor, skip: int) -> Tensor:
    return module.k_proj(hidden[:, skip:])


def _heads(vectors: Tensor, heads: int) -> Tensor:
    """Return (B, T, H * d) as (B, H, T, d)."""
    return vectors.unflatten(-1, (heads, -1)).transpose(1, 2)


_READERS: dict[str, Callable[[Any, Tensor, int], Tensor]] = {
    "cls_attention": _cls_attention,
    "received_attention": _received_attention,
    "object_attention": _received_attention,
    "keys": _keys,
    "reader_attention": _reader_attention,
    "reader_keys": _reader_keys,
}


def image_keys(pixels: Tensor) -> Tensor:
    """Return an int64 fingerprint (B,) of each item's pixels (B, ...); integer sums, so the same in any batch.

    The first axis counts items. Half-precision pixels are widened exactly, so they keep their own fingerprint.
    """
    bits = pixels.float().flatten(1).contiguous().view(torch.int32).long()
    place = torch.arange(bits.shape[1], device=bits.device) % 8191 + 1
    return (bits * place).sum(dim=1) & ((1 << 31) - 1)
