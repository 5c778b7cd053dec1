"""What stages rely on in stock decoders: names of modules and of layers' keyword arguments, all in this file."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from prunetune.pruning.errors import PruningError

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, (B or 1, n, d)."""

_ATTENTION = ("q_proj", "k_proj", "head_dim", "scaling")


@dataclass(frozen=True)
class Decoder:
    """The decoder of a stock model.

    Attributes:
        model: the language model without its head.
        layers: its decoder layers.
        lowest: the lowest boundary that it can have.
        why: why that is not 1.
        window: the shortest sliding window of its layers; None if there is none.
    """

    model: Any
    layers: tuple[Any, ...]
    lowest: int
    why: str
    window: int | None

    @property
    def mask(self) -> str:
        """What masks are like now, "float" (eager), "bool" (sdpa) or "columns" (flash): attention can be set anew."""
        return _kind_of_mask(self.model)

    def rotary(self, hidden: Tensor, positions: Int[Tensor, "B n"]) -> Rotary:
        """Return cosines and sines of plain positions."""
        rotary: Rotary = self.model.rotary_emb(hidden, position_ids=positions)
        return rotary

    def final_norm(self, hidden: Float[Tensor, "B n D"]) -> Float[Tensor, "B n D"]:
        """Return states after the model's final norm."""
        normed: Tensor = self.model.norm(hidden)
        return normed

    def one_rotary(self) -> bool:
        """Return whether cosines and sines are made from plain positions alone, the same for all layers."""
        return "layer_type" not in inspect.signature(self.model.rotary_emb.forward).parameters


def decoder_of(language_model: nn.Module, deepstack: int = 0) -> Decoder:
    """Return the decoder of a stock language model.

    Args:
        language_model: without its head.
        deepstack: how many layers add features to visual tokens after they ran.

    Raises:
        PruningError: in one line, for a model whose parts are called otherwise or that can't have stages.
    """
    model: Any = language_model
    kind = type(model).__name__
    for name in ("layers", "norm", "rotary_emb"):
        if not hasattr(model, name):
            raise PruningError(f"stages can't run in {kind}: it has no `{name}`; leave pruning.stages out")
    layers = tuple(model.layers)
    for layer in layers:
        attention = getattr(layer, "self_attn", None)
        missing = [name for name in _ATTENTION if not hasattr(attention, name)]
        if attention is None or missing or not hasattr(layer, "input_layernorm"):
            told = ", ".join(missing) or "self_attn or input_layernorm"
            raise PruningError(f"stages can't run in {kind}: its layers have no {told}; leave pruning.stages out")
        rotation(attention)
    lowest, why = _lowest(model, deepstack)
    _kind_of_mask(model)
    return Decoder(model, layers, lowest, why, _window(layers))


def _lowest(model: Any, deepstack: int) -> tuple[int, str]:
    types = list(getattr(model.config, "layer_types", None) or [])
    # Each kind's mask is sized by the first layer of that kind, which so must see the whole sequence.
    first = {kind: types.index(kind) for kind in set(types)}
    last_kind = max(first, key=lambda kind: first[kind], default="")
    if first and first[last_kind] + 1 > max(deepstack, 1):
        layer = first[last_kind]
        return layer + 1, f"masks of its {last_kind} layers are sized by the first of them, layer {layer}"
    if deepstack > 1:
        return deepstack, f"its first {deepstack} layers add deepstack features to every visual token"
    return 1, ""


def _window(layers: tuple[Any, ...]) -> int | None:
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in layers]
    return min((window for window in windows if window is not None), default=None)


def _kind_of_mask(model: Any) -> str:
    attention = model.config._attn_implementation
    if attention == "eager":
        return "float"
    if attention == "sdpa":
        return "bool"
    if "flash" in str(attention):
        return "columns"
    raise PruningError(
        f"stages can't run with attn_implementation {attention!r}, whose masks can't be cut; set sdpa or eager"
    )


def rotation(attention: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that rotates queries and keys, from the attention's own module.

    Raises:
        PruningError: if there is none.
    """
    module = sys.modules[type(attention).__module__]
    found: Callable[..., tuple[Tensor, Tensor]] | None = getattr(module, "apply_rotary_pos_emb", None)
    if found is None:
        raise PruningError(
            f"stages can't run in {type(attention).__name__}: {module.__name__} has no apply_rotary_pos_emb; leave "
            "pruning.stages out"
        )
    return found


def at_slots(rotary: Rotary, slots: Int[Tensor, "B n"]) -> Rotary:
    """Return cosines and sines of some slots."""
    cos, sin = rotary
    return _gathered(cos, slots), _gathered(sin, slots)


def counted_from(rotary: Rotary, first: Int[Tensor, "B 1"]) -> Rotary:
    """Return cosines and sines with positions counted from those of one slot of each row.

    A plain call of a model numbers padding on the left as well, and stock generation does not.
    """
    cos, sin = (part.float().expand(len(first), -1, -1) for part in rotary)
    cos_first, sin_first = at_slots((cos, sin), first)  # (B, 1, d)
    size = (cos_first**2 + sin_first**2).sqrt()  # 1, but for rotary embeddings that are scaled
    cos_first, sin_first = cos_first / size, sin_first / size
    return cos * cos_first + sin * sin_first, sin * cos_first - cos * sin_first


def _gathered(values: Tensor, slots: Int[Tensor, "B n"]) -> Tensor:
    values = values.expand(len(slots), -1, -1)
    return values.gather(1, slots[:, :, None].expand(-1, -1, values.shape[2]))


def keys_of(layer: Any, hidden: Float[Tensor, "B n D"], rotary: Rotary) -> Float[Tensor, "B G n d"]:
    """Return the keys of a layer after rotation, of each key head, as it projects what enters it; cast to float32."""
    attention = layer.self_attn
    keys = attention.k_proj(layer.input_layernorm(hidden))
    return _rotated(attention, keys, "k_norm", rotary)


def _rotated(attention: Any, values: Tensor, norm: str, rotary: Rotary) -> Tensor:
    heads = values.view(*values.shape[:2], -1, attention.head_dim)
    if getattr(attention, norm, None) is not None:
        heads = getattr(attention, norm)(heads)
    heads = heads.transpose(1, 2).float()  # (B, heads, n, d)
    cos, sin = rotary
    turned, _ = rotation(attention)(heads, heads, cos.float(), sin.float())
    return turned


def attention_of(
    layer: Any,
    hidden: Float[Tensor, "B n D"],
    rotary: Rotary,
    queries: Int[Tensor, "B Q"],
    there: Bool[Tensor, "B Q"],
    shown: Bool[Tensor, "B n"],
) -> Float[Tensor, "B H Q n"]:
    """Return what some slots attend to in a layer, from what enters it, in float32; zeros in rows that do not exist.

    Queries and keys are projected as the layer does it, in its own precision: float32 copies of weights would not be
    there under ZeRO-3, and bring what half precision keeps no nearer to what float32 keeps (docs/pruners/stages.md).

    Args:
        layer: a decoder layer.
        hidden: what enters it.
        rotary: cosines and sines of its slots.
        queries: the slots whose attention is wanted.
        there: which of them exist.
        shown: which slots are neither padding nor filler.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    keys = _rotated(attention, attention.k_proj(normed), "k_norm", rotary)
    asked = normed.gather(1, queries[:, :, None].expand(-1, -1, normed.shape[2]))
    asked = _rotated(attention, attention.q_proj(asked), "q_norm", at_slots(rotary, queries))
    keys = keys.repeat_interleave(asked.shape[1] // keys.shape[1], dim=1)
    scores = asked @ keys.transpose(2, 3) * attention.scaling  # (B, H, Q, n)
    cap = getattr(attention, "attn_logit_softcapping", None)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    earlier = torch.arange(hidden.shape[1], device=hidden.device) <= queries[:, :, None]  # (B, Q, n)
    seen = (earlier & shown[:, None, :])[:, None]
    scores = scores.masked_fill(~seen, float("-inf"))
    # A row that does not exist may see nothing, which would be NaN.
    scores = scores.masked_fill(~there[:, None, :, None], 0.0)
    return scores.softmax(dim=-1) * there[:, None, :, None]


def unit_scores_of(layer: Any, rotary: Rotary, queries: Int[Tensor, "B Q"]) -> Float[Tensor, "B Q n"]:
    """Return what queries and keys of ones alone score before the softmax, by their distance alone."""
    attention = layer.self_attn
    cos = rotary[0]
    rows, count = queries.shape[0], cos.shape[1]
    ones = torch.ones(rows, 1, count, attention.head_dim, device=cos.device)
    whole = tuple(part.float().expand(rows, -1, -1) for part in rotary)
    keys, _ = rotation(attention)(ones, ones, *whole)
    asked = keys.gather(2, queries[:, None, :, None].expand(-1, -1, -1, attention.head_dim))
    return (asked @ keys.transpose(2, 3) * attention.scaling)[:, 0]


def check_cache(cache: Any) -> None:
    """Check that every layer of a cache can have a length of its own; raises PruningError."""
    for layer in getattr(cache, "layers", ()):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise PruningError(
                f"stages need a cache of another length for each layer, and {type(layer).__name__} has no such; "
                "generate with a dynamic cache (cache_implementation: null)"
            )
    if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
        raise PruningError(
            f"stages were not tried with a cache like this {type(cache).__name__}; generate with a plain DynamicCache"
        )


def scattered(
    states: Float[Tensor, "B n D"],
    columns: Int[Tensor, "B n"],
    left_out: Bool[Tensor, "B n"] | None,
    width: int,
) -> Float[Tensor, "B L D"]:
    """Return states at their columns of the prompt, and zeros where there are none.

    States of the columns ``[[0, 2]]`` stand in the first and the third of ``width`` 3.
    """
    if left_out is not None:
        states = states.masked_fill(left_out[:, :, None], 0.0)
    full = states.new_zeros(states.shape[0], width, states.shape[2])
    return full.scatter_add(1, columns[:, :, None].expand(-1, -1, states.shape[2]), states)


def cut_mask(
    mask: Shaped[Tensor, "B h L L2"],
    columns: Int[Tensor, "B n"],
    filler: Bool[Tensor, "B n"] | None,
) -> Shaped[Tensor, "B h n n"]:
    """Return the rows and columns of a mask that are left, without filler; filler sees itself, so no row is empty."""
    rows, count = columns.shape
    mask = mask.expand(rows, -1, -1, -1)
    heads, length = mask.shape[1], mask.shape[3]
    mask = mask.gather(2, columns[:, None, :, None].expand(-1, heads, -1, length))
    mask = mask.gather(3, columns[:, None, None, :].expand(-1, heads, count, -1))
    if filler is None:
        return mask
    itself = torch.eye(count, dtype=torch.bool, device=mask.device) & filler[:, :, None]  # (B, n, n)
    hidden = filler[:, None, :] & ~itself
    if mask.dtype == torch.bool:
        return (mask | itself[:, None]) & ~hidden[:, None]
    return mask.masked_fill(hidden[:, None], torch.finfo(mask.dtype).min).masked_fill(itself[:, None], 0.0)


def causal_mask(
    shown: Bool[Tensor, "B n"], like: Tensor | None, kind: str, dtype: torch.dtype
) -> Shaped[Tensor, "B 1 n n"]:
    """Return the plain causal mask of slots in their order; what is not shown sees itself alone.

    Args:
        shown: which slots are neither padding nor filler.
        like: a mask of the dtype that is wanted, if there is one.
        kind: "float" or "bool".
        dtype: of float masks, where there is none to be like.
    """
    count = shown.shape[1]
    order = torch.ones(count, count, dtype=torch.bool, device=shown.device).tril()
    itself = torch.eye(count, dtype=torch.bool, device=shown.device)
    seen = ((order & shown[:, None, :]) | itself)[:, None]
    return as_mask(seen, like, kind, dtype)


def as_mask(seen: Bool[Tensor, "B 1 q n"], like: Tensor | None, kind: str, dtype: torch.dtype) -> Tensor:
    """Return a boolean mask as the model's attention takes it."""
    dtype = dtype if like is None else like.dtype
    if dtype == torch.bool or (like is None and kind == "bool"):
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
