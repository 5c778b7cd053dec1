"""The signals that methods can ask for: one record each says what it is, where it comes from and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from prunetune.pruning.errors import PruningError
from prunetune.pruning.ops.attention import received_attention

Axes = Literal["B N C", "B N", "B H N", "B C", "B M E", "B"]
"""B items, N tokens, H heads, C channels, M pieces of text of width E."""
Source = Literal["attention", "reader", "output", "pixels", "text"]


@dataclass(frozen=True)
class Signal:
    """Something that methods can ask for in ``needs``.

    The feature layer is the vision layer whose output enters the projector; the reader is the layer after it. An entry
    of ``needs`` may name a layer by its number from 1, ``"object_attention@9"``; then that layer is read.

    Attributes:
        name: as it stands in ``needs`` and in ``VisualTokens.signals``.
        axes: its shape; what has no N belongs to an item as a whole.
        source: "attention" of the feature layer, of the "reader", the feature layer's "output", the "pixels", or the
            "text" of the instruction.
        read: makes it of its source: an :class:`Attention`, the layer's output (B, T, C), or pixels; None for text.
        about: what it is, in words.
        cls: whether there must be a [CLS] token, and it must not enter the projector.
        space: for text, the space it lives in: "clip" or "llm".
    """

    name: str
    axes: Axes
    source: Source
    read: Callable[[Any], Tensor] | None
    about: str
    cls: bool = False
    space: Literal["clip", "llm"] | None = None

    @property
    def per_token(self) -> bool:
        """Whether every token has its own, so that tokens of several items can be pooled."""
        return "N" in self.axes.split()


@dataclass(frozen=True)
class Attention:
    """The input and the projections of one self-attention layer, for B items of T positions.

    Numbers are computed in float64 and rounded to float32 once, so that they have the same bits whatever the batch, the
    number of threads and the model's dtype are.

    Attributes:
        hidden: (B, T, C) what enters the projections, in the model's dtype.
        query_weight: (H * d, C).
        query_bias: (H * d,) or None.
        key_weight: (H * d, C).
        key_bias: (H * d,) or None.
        heads: H.
        scale: factor of the logits.
        skip: leading positions that are no patches, [CLS] first.
        rotate: turns (B, H, T, d) as the layer turns queries and keys; None where it does not.
        query_norm: the layer's norm of queries (B, T, H * d) over all heads, in float64; None where it has none.
        key_norm: the same for keys.
        visible: (B, T), false for padding, which the layer hides from all others; None where there is none.
    """

    hidden: Float[Tensor, "B T C"]
    query_weight: Float[Tensor, "Hd C"]
    query_bias: Float[Tensor, " Hd"] | None
    key_weight: Float[Tensor, "Hd C"]
    key_bias: Float[Tensor, " Hd"] | None
    heads: int
    scale: float
    skip: int
    rotate: Callable[[Tensor], Tensor] | None = None
    query_norm: Callable[[Tensor], Tensor] | None = None
    key_norm: Callable[[Tensor], Tensor] | None = None
    visible: Bool[Tensor, "B T"] | None = None

    def query(self) -> Float[Tensor, "B H T d"]:
        """Return all queries, (B, H, T, d) float32."""
        return self._turned(self._queries(self.hidden))

    def key(self) -> Float[Tensor, "B H T d"]:
        """Return all keys, (B, H, T, d) float32."""
        return self._turned(self._keys(self.hidden))

    def patch_keys(self) -> Float[Tensor, "B N Hd"]:
        """Return the keys of the patches with heads side by side, (B, N, H * d) float32, not turned."""
        return self._keys(self.hidden[:, self.skip :]).float()

    def cls_attention(self, heads: int | None = None) -> Float[Tensor, "B H N"]:
        """Return the softmaxed attention of [CLS] to the patches, (B, heads, N) float32.

        ``q . (W x + b)`` is ``(W' q) . x`` plus a constant of the row, which the softmax removes: so the one query is
        sent back through the key projection, and no key is computed (CLIP-L: 19 MFLOP an image instead of 1.2 GFLOP).

        Args:
            heads: how many heads the query is cut into; None is the layer's. With 1 the scale is that of one head.
        """
        if heads is None:
            heads, scale = self.heads, self.scale
        else:
            # PruMerge reads the layer as if it had one head; its logits are scaled by that head's width.
            width = self.query_weight.shape[0] // heads
            scale = width**-0.5
        query = self._queries(self.hidden[:, :1])  # (B, 1, H * d)
        query = query[:, 0].unflatten(-1, (heads, -1))  # (B, H, d)
        if self.key_norm is not None:  # a norm of each key can't be sent back
            keys = self._keys(self.hidden).unflatten(-1, (heads, -1))  # (B, T, H, d)
            logits = torch.einsum("bhd,bthd->bht", query, keys) * scale  # (B, H, T)
        else:
            key_weight = self.key_weight.double().unflatten(0, (heads, -1))  # (H, d, C)
            back = torch.einsum("bhd,hdc->bhc", query, key_weight)  # (B, H, C)
            logits = (back @ self.hidden.double().transpose(1, 2)) * scale  # (B, H, T)
        return logits.softmax(dim=-1)[..., self.skip :].float()

    def _queries(self, hidden: Float[Tensor, "B T C"]) -> Float[Tensor, "B T Hd"]:
        """Return queries, heads side by side, (B, T, H * d) float64."""
        queries = _linear(hidden, self.query_weight, self.query_bias)
        return queries if self.query_norm is None else self.query_norm(queries)

    def _keys(self, hidden: Float[Tensor, "B T C"]) -> Float[Tensor, "B T Hd"]:
        """Return keys, heads side by side, (B, T, H * d) float64."""
        keys = _linear(hidden, self.key_weight, self.key_bias)
        return keys if self.key_norm is None else self.key_norm(keys)

    def _turned(self, projected: Float[Tensor, "B T Hd"]) -> Float[Tensor, "B H T d"]:
        heads = projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if self.rotate is not None:
            heads = self.rotate(heads)
        return heads.float()


def _linear(
    hidden: Float[Tensor, "B T C"],
    weight: Float[Tensor, "O C"],
    bias: Float[Tensor, " O"] | None,
) -> Float[Tensor, "B T O"]:
    """Return ``hidden`` (B, T, C) through a linear layer, item by item, float64."""
    product = hidden.double() @ weight.double().transpose(0, 1)
    return product if bias is None else product + bias.double()


def image_keys(pixels: Shaped[Tensor, "B ..."]) -> Int[Tensor, " B"]:
    """Return an int64 fingerprint (B,) of each item's pixels (B, ...); integer sums, so the same in any batch.

    The first axis counts items. Half-precision pixels are widened exactly, so they keep their own fingerprint.
    """
    bits = pixels.float().flatten(1).contiguous().view(torch.int32).long()  # (B, values)
    # Weighted by position, or an image and its mirror image would have one fingerprint.
    weight = torch.arange(bits.shape[1], device=bits.device) % 8191 + 1
    return (bits * weight).sum(dim=1) & ((1 << 31) - 1)


def _received(attention: Attention) -> Float[Tensor, "B H N"]:
    return received_attention(attention.query(), attention.key(), attention.scale, attention.skip, attention.visible)


def _mean_keys(attention: Attention) -> Float[Tensor, "B N d"]:
    by_head = attention.patch_keys().unflatten(-1, (attention.heads, -1))  # (B, N, H, d)
    return by_head.mean(dim=2)


def _cls_feature(hidden: Float[Tensor, "B T C"]) -> Float[Tensor, "B C"]:
    return hidden[:, 0]


def _reader_attention(attention: Attention) -> Float[Tensor, "B N"]:
    return attention.cls_attention(heads=1)[:, 0]


_SIGNALS: dict[str, Signal] = {}


def register_signal(signal: Signal) -> Signal:
    """Add a signal; every tower that has its source then offers it.

    Raises:
        PruningError: if the name is taken.
    """
    if signal.name in _SIGNALS or signal.name in ("features", "projected"):
        raise PruningError(f"two signals are called {signal.name!r}; rename one")
    _SIGNALS[signal.name] = signal
    return signal


def registered_signals() -> dict[str, Signal]:
    """Return all signals by name."""
    return dict(_SIGNALS)


def signal_of(need: str) -> Signal:
    """Return the signal that an entry of ``needs`` asks for: ``"object_attention@9"`` is ``object_attention``.

    Raises:
        PruningError: if there is none.
    """
    name = need.partition("@")[0]
    if name not in _SIGNALS:
        raise PruningError(f"there is no signal {name!r}; there are {', '.join(sorted(_SIGNALS))}")
    return _SIGNALS[name]


def layer_of(need: str) -> int | None:
    """Return the layer that an entry of ``needs`` names, counted from 1; None if it leaves it to the signal.

    ``"object_attention@9"`` is 9, ``"keys"`` is None.
    """
    number = need.partition("@")[2]
    return int(number) if number else None


def of_source(needs: Iterable[str], *sources: Source) -> list[str]:
    """Return the entries of ``needs`` whose signals come from ``sources``, in alphabetical order."""
    # Sorted, because a set's order differs from process to process.
    return sorted(need for need in needs if signal_of(need).source in sources)


for _signal in (
    Signal(
        name="cls_attention",
        axes="B H N",
        source="attention",
        read=Attention.cls_attention,
        about="softmaxed [CLS]-to-patch attention of the feature layer",
        cls=True,
    ),
    Signal(
        name="received_attention",
        axes="B H N",
        source="attention",
        read=_received,
        about="attention each patch receives in the feature layer, mean over all queries",
    ),
    Signal(
        name="object_attention",
        axes="B H N",
        source="attention",
        read=_received,
        about="the same at the layer that the method names as object_attention@LAYER",
    ),
    Signal(
        name="keys",
        axes="B N C",
        source="attention",
        read=_mean_keys,
        about="key vectors of the feature layer with bias, unscaled, mean over heads",
    ),
    Signal(
        name="cls_feature",
        axes="B C",
        source="output",
        read=_cls_feature,
        about="hidden state of [CLS] where the features come from",
        cls=True,
    ),
    Signal(
        name="reader_attention",
        axes="B N",
        source="reader",
        read=_reader_attention,
        about="[CLS]-to-patch attention of the reader, its heads taken as one",
        cls=True,
    ),
    Signal(
        name="reader_keys",
        axes="B N C",
        source="reader",
        read=Attention.patch_keys,
        about="key vectors of the reader, heads side by side",
        cls=True,
    ),
    Signal(
        name="image_key",
        axes="B",
        source="pixels",
        read=image_keys,
        about="int64 fingerprint of each item's pixels, the same in any batch",
    ),
    Signal(
        name="image_embeds",
        axes="B N C",
        source="text",
        read=None,
        about="the tokens in CLIP's shared space, not normalised",
        space="clip",
    ),
    Signal(
        name="text_embeds",
        axes="B M E",
        source="text",
        read=None,
        about="the instruction there, in pieces of at most 77 CLIP tokens; rows of zeros are padding",
        space="clip",
    ),
    Signal(
        name="general_embeds",
        axes="B M E",
        source="text",
        read=None,
        about="the method's general_prompts there",
        space="clip",
    ),
    Signal(
        name="text_token_embeds",
        axes="B M E",
        source="text",
        read=None,
        about="the instruction's LLM token embeddings; rows of zeros are padding",
        space="llm",
    ),
    Signal(
        name="general_token_embeds",
        axes="B M E",
        source="text",
        read=None,
        about="mean LLM token embedding of each general prompt",
        space="llm",
    ),
):
    register_signal(_signal)
