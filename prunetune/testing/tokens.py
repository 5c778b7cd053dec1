"""Random visual tokens with every signal there is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunetune.pruning import VisualTokens
from prunetune.pruning.signals import signal_of


def make_tokens(
    batch: int,
    rows: int,
    columns: int,
    channels: int = 12,
    heads: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    frames: int = 1,
) -> VisualTokens:
    """Return ``batch`` items of ``frames * rows * columns`` random tokens with every built-in signal.

    Args:
        batch: B.
        rows: of the grid.
        columns: of the grid, so that N is ``frames * rows * columns``.
        channels: C; the projected tokens have four more.
        heads: H, of the attention signals.
        seed: the same seed gives the same tokens.
        dtype: of features and projected tokens; signals are float32, as families hand them over.
        frames: above 1 the items are clips, and what belongs to a frame as a whole has an axis of frames.
    """
    g = torch.Generator().manual_seed(seed)
    count = frames * rows * columns
    each = (frames,) if frames > 1 else ()

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=g)

    def attention(*shape: int) -> Tensor:
        return normal(*shape, count + 1).mul(2).softmax(-1)[..., 1:].contiguous()

    words = normal(5, channels + 4)
    words[:, 3 + seed % 2 :] = 0  # padding
    pieces = normal(2, 6)
    pieces[::2, 1] = 0
    cls_attention = attention(heads)
    return VisualTokens(
        features=normal(count, channels).to(dtype),
        projected=normal(count, channels + 4).to(dtype),
        signals={
            "cls_attention": cls_attention,
            "received_attention": attention(heads),
            "object_attention": attention(heads),
            "keys": normal(count, 7),
            "cls_feature": normal(*each, channels),
            "reader_attention": attention(),
            "reader_keys": normal(count, channels),
            "image_embeds": normal(count, 6),
            "text_embeds": pieces,
            "general_embeds": normal(3, 6),
            "text_token_embeds": words,
            "general_token_embeds": normal(3, channels + 4),
            "image_key": torch.randint(0, 2**31 - 1, (batch, *each), generator=g),
            "shallow_attention": attention(heads),
            "head_feature": normal(*each, channels),
            "head_attention": attention(),
        },
        grid=(rows, columns),
        frames=frames,
    )


def only(tokens: VisualTokens, item: int) -> VisualTokens:
    """Return one item of a batch, in float32."""

    def one(values: Tensor) -> Tensor:
        values = values[item : item + 1]
        return values.float() if values.is_floating_point() else values

    return tokens.map(one)


def reading(tokens: VisualTokens, needs: Iterable[str], **fields: Any) -> VisualTokens:
    """Return the same tokens with nothing but the signals in ``needs``, which is what a family hands over."""
    names = [signal_of(need).name for need in needs]
    return replace(tokens, signals={name: tokens.require(name) for name in names}, **fields)
