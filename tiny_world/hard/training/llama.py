"""The stock Llama's arithmetic for many questions about one image, with its attention at hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, rotate_half


@dataclass
class Rotation:
    """Cosines and sines of rotary positions, both (length, head width)."""

    cos: Tensor
    sin: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """Rotate states (..., length, head width)."""
        return states * self.cos + rotate_half(states) * self.sin


def read_questions(
    llama: LlamaModel, prefix: Tensor, questions: Tensor, watched: tuple[int, ...] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """Encode a prefix once and all questions behind it; every question sees the prefix and itself.

    One row with a square mask does the same and spends half of its attention on pairs of questions that are masked.

    Args:
        llama: the language model; its weights are used, its forward is not called.
        prefix: embeddings (B, P, D) without padding.
        questions: embeddings (B, Q, T, D); padding stands at the end, where no earlier word sees it.
        watched: layers, from 0, whose attention to the prefix is returned.

    Returns:
        Normed last states (B, Q, T, D), and by layer the attention to the prefix (B, H, Q, T, P).
    """
    length = prefix.shape[1]
    positions = torch.arange(length + questions.shape[2])[None]
    cos, sin = llama.rotary_emb(prefix, positions)  # (1, P + T, d)
    of_prefix = Rotation(cos[0, :length], sin[0, :length])
    of_questions = Rotation(cos[0, length:], sin[0, length:])
    seen = {}
    last = len(llama.layers) - 1
    for number, layer in enumerate(llama.layers):
        assert isinstance(layer, LlamaDecoderLayer)
        attention = layer.self_attn
        normed_prefix, normed = layer.input_layernorm(prefix), layer.input_layernorm(questions)
        keys = of_prefix(_heads(attention, attention.k_proj(normed_prefix)))  # (B, H, P, d)
        values = _heads(attention, attention.v_proj(normed_prefix))
        mixed, weights = _attend(attention, normed, keys, values, of_questions)
        if number in watched:
            seen[number] = weights
        questions = questions + attention.o_proj(mixed)
        questions = questions + layer.mlp(layer.post_attention_layernorm(questions))
        if number == last:  # nothing reads the prefix after its last keys and values
            break
        queries = of_prefix(_heads(attention, attention.q_proj(normed_prefix)))
        own = F.scaled_dot_product_attention(queries, keys.to(queries.dtype), values, is_causal=True)
        prefix = prefix + attention.o_proj(own.transpose(1, 2).flatten(2))
        prefix = prefix + layer.mlp(layer.post_attention_layernorm(prefix))
    return llama.norm(questions), seen


def _heads(attention: LlamaAttention, states: Tensor) -> Tensor:
    """Split (..., length, H d) into (..., H, length, d)."""
    return states.unflatten(-1, (-1, attention.head_dim)).transpose(-2, -3)


def _attend(
    attention: LlamaAttention, normed: Tensor, keys: Tensor, values: Tensor, rotate: Rotation
) -> tuple[Tensor, Tensor]:
    """Attend from questions (B, Q, T, D) to prefix keys (B, H, P, d) and to themselves; return also the weights."""
    count, length = normed.shape[1:3]
    queries = rotate(_heads(attention, attention.q_proj(normed)))  # (B, Q, H, T, d)
    own_keys = rotate(_heads(attention, attention.k_proj(normed)))
    own_values = _heads(attention, attention.v_proj(normed))
    flat = queries.transpose(1, 2).flatten(2, 3)  # (B, H, Q T, d)
    to_prefix = (flat @ keys.transpose(-1, -2)).unflatten(2, (count, length))  # (B, H, Q, T, P)
    to_own = (queries @ own_keys.transpose(-1, -2)).transpose(1, 2)  # (B, H, Q, T, T)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    to_own = to_own.masked_fill(later, float("-inf"))
    scores = torch.cat([to_prefix, to_own], dim=-1) * attention.scaling
    weights = scores.float().softmax(-1)
    prefix_weights, own_weights = weights.split([keys.shape[2], length], dim=-1)
    mixed = prefix_weights.flatten(2, 3).to(values.dtype) @ values  # (B, H, Q T, d)
    own = own_weights.transpose(1, 2).to(values.dtype) @ own_values  # (B, Q, H, T, d)
    mixed = mixed.unflatten(2, (count, length)).permute(0, 2, 3, 1, 4)  # (B, Q, T, H, d)
    return (mixed + own.transpose(2, 3)).flatten(3), prefix_weights
