"""Attention over samples that stand behind one another in one row, each seeing itself and a prefix that all share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

NAME = "prunetune_segments"
"""What transformers calls this attention."""


@dataclass(frozen=True)
class Prefix:
    """What all prompts begin with, as the LLM's layers see it.

    Attributes:
        ids: (P,) its tokens.
        keys: for each layer (H, P, d), after rotation.
        values: for each layer (H, P, d).
    """

    ids: Int[Tensor, " P"]
    keys: Sequence[Float[Tensor, "H P d"]]
    values: Sequence[Float[Tensor, "H P d"]]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Segments:
    """Where the samples of a packed row are.

    Attributes:
        lengths: tokens of each, without the prefix.
        prefix: what stands before each of them; None for nothing.
        device: where the row is.
    """

    lengths: tuple[int, ...]
    prefix: Prefix | None
    device: torch.device

    @property
    def shift(self) -> int:
        """Tokens of the prefix."""
        return 0 if self.prefix is None else len(self.prefix)

    @cached_property
    def query_ends(self) -> Int[Tensor, " n1"]:
        """(n + 1,) int32, where each sample's queries begin, and the end."""
        return _ends(self.lengths, self.device)

    @cached_property
    def key_ends(self) -> Int[Tensor, " n1"]:
        """(n + 1,) int32, where each sample's keys begin once the prefix stands before each, and the end."""
        return _ends([self.shift + length for length in self.lengths], self.device)

    @cached_property
    def key_order(self) -> Int[Tensor, " keys"]:
        """Where each key is in prefix and row, one behind the other.

        A prefix of 2 and samples of 1 and 2 tokens are ``[0, 1, 2, 0, 1, 3, 4]``.
        """
        before = torch.arange(self.shift)
        parts, first = [], self.shift
        for length in self.lengths:
            parts += [before, torch.arange(first, first + length)]
            first += length
        return torch.cat(parts).to(self.device)


def _ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return torch.tensor(ends, dtype=torch.int32, device=device)


class UnknownAttention(Exception):
    """Attention that this module does not compute; the message says what it is."""


class _Current:
    """The row that runs now; recomputed layers of its backward pass are of the same row."""

    segments: Segments | None = None


def place(segments: Segments | None) -> None:
    """Say where the samples of the next row are; it stays said until its backward pass is over."""
    _Current.segments = segments


@contextmanager
def attending_by_segments(language_model: nn.Module) -> Iterator[None]:
    """While open, the layers of a language model attend by the segments that :func:`place` says."""
    config: Any = language_model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        place(None)


def segment_attention(
    module: nn.Module,
    query: Float[Tensor, "B H T d"],
    key: Float[Tensor, "B G T d"],
    value: Float[Tensor, "B G T d"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "B T H d"], None]:
    """Return the attention output of a packed row, B = 1, of H query heads and G key heads; as transformers calls it.

    On a GPU in half precision one kernel for variable lengths runs it. Elsewhere one call a sample does: the cost is
    the sum of the squared lengths, where a mask over the whole row would cost the square of their sum.

    Raises:
        UnknownAttention: for attention that is more than softmax of scaled products.
        RuntimeError: if nobody said where the samples are, or they are not those of this row.
    """
    segments = _Current.segments
    if softcap is not None or s_aux is not None or (dropout and module.training):
        raise UnknownAttention("its attention caps scores, has sinks or drops out")
    if segments is None or sum(segments.lengths) != query.shape[2]:
        raise RuntimeError("attention by segments was asked for, and the row's own were not placed; please report this")
    layer: Any = module.layer_idx
    if segments.prefix is not None:
        key = torch.cat([segments.prefix.keys[layer][None], key], dim=2)
        value = torch.cat([segments.prefix.values[layer][None], value], dim=2)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _in_one_kernel(query, key, value, segments, scaling, sliding_window), None
    return _one_by_one(query, key, value, segments, scaling, sliding_window), None


def leak_between(language_model: nn.Module) -> str | None:
    """Return how samples in one row see each other in a language model; None if they do not.

    Two rows differ in their first sample alone: what the second one becomes must be the same to the bit. It would not
    be in layers that are no attention and run along the row, such as convolutions or state spaces.
    """
    model: Any = language_model
    device = model.device
    lengths = (5, 7)
    ids = torch.arange(3, 3 + sum(lengths), device=device)[None]
    other = ids.clone()
    other[:, : lengths[0]] += 20
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), attending_by_segments(model):
            found = []
            for row in (ids, other):
                place(Segments(lengths, None, device))
                output = model(input_ids=row, position_ids=positions, use_cache=False)
                found.append(output.last_hidden_state[:, lengths[0] :])
    except UnknownAttention as error:
        return str(error)
    finally:
        model.train(was_training)
    return None if torch.equal(*found) else "layers of its LLM run along the row, over the ends of samples"


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    shift, lengths = segments.shift, list(segments.lengths)
    # Split and not sliced: the gradient of a slice is as long as the whole row.
    key_before, *keys = key.split([shift, *lengths], dim=2)
    value_before, *values = value.split([shift, *lengths], dim=2)
    outputs = []
    for own_query, own_key, own_value in zip(query.split(lengths, dim=2), keys, values, strict=True):
        length = own_query.shape[2]
        if shift:
            own_key = torch.cat([key_before, own_key], dim=2)
            own_value = torch.cat([value_before, own_value], dim=2)
        mask = None
        if shift or (window is not None and window < length):
            mask = _seen(length, shift, window, query.device)
        outputs.append(
            functional.scaled_dot_product_attention(
                own_query, own_key, own_value, attn_mask=mask, is_causal=mask is None, scale=scaling
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _seen(length: int, shift: int, window: int | None, device: torch.device) -> Tensor:
    """Return which of ``shift + length`` keys each of ``length`` queries sees, (length, shift + length) boolean."""
    queries = torch.arange(shift, shift + length, device=device)[:, None]
    keys = torch.arange(shift + length, device=device)[None]
    seen = keys <= queries
    return seen if window is None else seen & (queries - keys < window)


def _in_one_kernel(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, d)
    if segments.shift:
        keys, values = keys.index_select(0, segments.key_order), values.index_select(0, segments.key_order)
    longest = max(segments.lengths)
    output = varlen_attn(
        queries,
        keys,
        values,
        segments.query_ends,
        segments.key_ends,
        longest,
        segments.shift + longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)  # more comes back where it is asked for
    return output[None]


AttentionInterface.register(NAME, segment_attention)
