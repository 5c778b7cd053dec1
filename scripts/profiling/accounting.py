"""Our own accounting: FLOP of an inference by part, and the bytes of its key-value cache.

A multiplication and an addition are two operations, and attention is counted over all pairs of tokens: so does torch's
counter, and so do most papers that count by machine. Norms, activations, softmax and rotary positions are left out.
What enters the LLM is a list with the number of tokens that each layer processes, text included: layers of one model
may see unlike many, where a method drops tokens between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from prunetune.train.flops import Work, flops_of
from prunetune.train.shape import LanguageShape, ModelShape


@dataclass(frozen=True)
class Flop:
    """FLOP of one request by part; those of several add up.

    Attributes:
        tower: all of its layers, those behind the one that is read too: inference runs them.
        projector: on every token, before any is dropped.
        prefill: the LLM over the prompt, and its head at one position.
        decode: the LLM and its head for all further tokens.
    """

    tower: float = 0
    projector: float = 0
    prefill: float = 0
    decode: float = 0

    @property
    def total(self) -> float:
        """All parts together; what the pruner itself computes is not among them."""
        return self.tower + self.projector + self.prefill + self.decode

    def __add__(self, other: Flop) -> Flop:
        return Flop(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def parts(self) -> dict[str, float]:
        """Return the parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def flop_of(shape: ModelShape, encoded: Work, layers: Sequence[float], new_tokens: int) -> Flop:
    """Return what one request costs.

    Args:
        shape: of the model.
        encoded: patches that the tower sees, and tokens that the projector makes.
        layers: how many tokens of the prompt each layer of the LLM processes, see :func:`same_everywhere`.
        new_tokens: length of the answer; its first token belongs to the prefill.
    """
    vision = flops_of(shape, encoded, stop_tower=False)
    return Flop(
        tower=vision.tower,
        projector=vision.projector / 3,  # counted there forward and twice backward
        prefill=prefill_flop(shape.language, layers),
        decode=decode_flop(shape.language, layers, new_tokens),
    )


def same_everywhere(shape: ModelShape, tokens: float) -> list[float]:
    """Return how many tokens each layer processes where none is dropped between layers."""
    return [tokens] * shape.language.layers


def prefill_flop(language: LanguageShape, layers: Sequence[float]) -> float:
    """Return the FLOP of a prompt, of whose last position alone the logits are computed.

    Args:
        language: the LLM's shape.
        layers: how many tokens each layer processes.
    """
    linear = _linear_of_one(language, layers)
    total = 2.0 * language.head
    for tokens in layers:
        total += 2 * linear * tokens + 4 * language.query * tokens * tokens
    return total


def decode_flop(language: LanguageShape, layers: Sequence[float], new_tokens: int) -> float:
    """Return the FLOP of all new tokens but the first, which the prefill gives.

    Args:
        language: the LLM's shape.
        layers: how many tokens of the prompt each layer holds in its cache.
        new_tokens: length of the answer.
    """
    linear = _linear_of_one(language, layers)
    steps = max(new_tokens - 1, 0)
    total = 2.0 * language.head * steps
    for tokens, window in zip(layers, language.windows, strict=True):
        for step in range(1, steps + 1):
            # The token sees itself, and every token in the cache: those of the prompt and those made before it.
            seen = tokens + step if window is None else min(tokens + step, window)
            total += 2 * linear + 4 * language.query * seen
    return total


def cache_bytes(language: LanguageShape, layers: Sequence[float], element: int) -> float:
    """Return the bytes that keys and values of one prompt take.

    Args:
        language: the LLM's shape.
        layers: how many tokens each layer holds.
        element: bytes of one number, 2 in half precision.
    """
    _linear_of_one(language, layers)
    total = 0.0
    for tokens, window in zip(layers, language.windows, strict=True):
        # A sliding window's cache leaves a slot to the token that comes next.
        held = tokens if window is None else min(tokens, window - 1)
        total += 2 * language.key * element * held
    return total


def _linear_of_one(language: LanguageShape, layers: Sequence[float]) -> float:
    if len(layers) != language.layers:
        raise ValueError(f"{len(layers)} numbers of tokens were given for {language.layers} layers")
    return language.linear / language.layers
