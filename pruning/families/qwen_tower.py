"""The vision blocks of the Qwen families: rotary positions, images and frames as segments of one long sequence."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from prunetune.pruning.errors import PruningError
from prunetune.pruning.families.stock import QwenAttention, qwen_attention
from prunetune.pruning.hooks import LinearCall, record_keywords, record_linear
from prunetune.pruning.ops.precision import exact_float32
from prunetune.pruning.signals import Attention, Signal, layer_of, of_source, registered_signals, signal_of


@dataclass(frozen=True)
class QwenTower:
    """Vision blocks whose attention runs inside segments, and whose patches the merger joins to LLM tokens.

    Attributes:
        blocks: the vision blocks.
        feature: the block that attention is read from unless a method names one: the last that sees a whole image.
        patches: how many patches, one after another in the blocks' order, make one LLM token.
    """

    blocks: nn.ModuleList
    feature: int
    patches: int

    def signals(self) -> frozenset[str]:
        """Return the vision signals these blocks offer: there is no [CLS], and no layer reads the features."""
        return frozenset(name for name, signal in registered_signals().items() if _offered(signal))

    def index_of(self, need: str) -> int:
        """Return the index of the block that a signal is read from.

        Raises:
            PruningError: if there is no such block.
        """
        number = layer_of(need)
        if number is None:
            return self.feature
        if not 1 <= number <= len(self.blocks):
            raise PruningError(
                f"`{signal_of(need).name}` of vision layer {number} was asked for, but the tower has layers 1 to "
                f"{len(self.blocks)}; set the method's layer option"
            )
        return number - 1

    @contextmanager
    def record(self, needs: frozenset[str]) -> Iterator[dict[str, Tensor]]:
        """Collect signals while the tower runs; they are there as the context closes.

        Each is flat over all images, one entry per LLM token in the order of the blocks: (T, C), (T,) or (H, T).
        """
        flat: dict[str, Tensor] = {}
        attention = {need: self.index_of(need) for need in of_source(needs, "attention")}
        with ExitStack() as hooks:
            calls, keywords = {}, {}
            # Several signals of one block share one recording of it.
            for index in set(attention.values()):
                calls[index] = hooks.enter_context(record_linear(qwen_attention(self.blocks[index]).qkv))
                keywords[index] = hooks.enter_context(record_keywords(self.blocks[index].get_submodule("attn")))
            yield flat

        # Only now, when the hooks are removed: an error here must not leave the model with them.
        for need, index in attention.items():
            signal = signal_of(need)
            call = calls[index][0]
            with exact_float32(call.hidden.device):
                values = _by_segment(signal, qwen_attention(self.blocks[index]), call, keywords[index][0])
                flat[signal.name] = self._per_token(values, signal)

    def _per_token(self, values: Shaped[Tensor, ...], signal: Signal) -> Shaped[Tensor, ...]:
        """Return the mean over the patches of every LLM token."""
        axis = 1 if signal.axes == "B H N" else 0
        return values.unflatten(axis, (-1, self.patches)).mean(dim=axis + 1)


def _offered(signal: Signal) -> bool:
    if signal.source == "pixels":
        return True
    return signal.source == "attention" and signal.per_token and not signal.cls


def _by_segment(
    signal: Signal, module: QwenAttention, call: LinearCall, keywords: dict[str, Any]
) -> Shaped[Tensor, ...]:
    """Return a signal of every patch, (H, P), (P, C) or (P,): attention runs inside segments."""
    hidden = call.hidden  # (P, C)
    limits = keywords["cu_seqlens"].tolist()
    cos, sin = keywords["position_embeddings"]  # (P, d)
    query, key, _ = call.weight.chunk(3)  # one layer for queries, keys and values
    query_bias, key_bias = None, None
    if call.bias is not None:
        query_bias, key_bias, _ = call.bias.chunk(3)
    assert signal.read is not None  # only text has none
    axis = 1 if signal.axes == "B H N" else 0
    starts_of: dict[int, list[int]] = {}  # by the segment's length
    for start, end in itertools.pairwise(limits):
        starts_of.setdefault(end - start, []).append(start)
    pieces: dict[int, Tensor] = {}  # by their first patch
    # Segments of one length are one batch, as the items of a tower with a fixed size are.
    for length, starts in sorted(starts_of.items()):
        first = torch.tensor(starts, device=hidden.device)
        rows = first[:, None] + torch.arange(length, device=hidden.device)  # (segments, length)
        attention = Attention(
            hidden=hidden[rows],
            query_weight=query,
            query_bias=query_bias,
            key_weight=key,
            key_bias=key_bias,
            heads=module.num_heads,
            scale=module.scaling,
            skip=0,
            rotate=_Rotation(cos[rows], sin[rows]),
        )
        pieces |= dict(zip(starts, signal.read(attention), strict=True))
    in_order = [piece for _, piece in sorted(pieces.items())]
    return torch.cat(in_order, dim=axis)


@dataclass(frozen=True)
class _Rotation:
    """Turns (B, H, T, d) by its rotary positions, cosines and sines (B, T, d)."""

    cos: Float[Tensor, "B T d"]
    sin: Float[Tensor, "B T d"]

    def __call__(self, vectors: Float[Tensor, "B H T d"]) -> Float[Tensor, "B H T d"]:
        cos = self.cos[:, None].double()
        sin = self.sin[:, None].double()
        front, back = vectors.chunk(2, dim=-1)
        turned = torch.cat([-back, front], dim=-1)
        return vectors * cos + turned * sin
