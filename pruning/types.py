"""What a pruner reads (``VisualTokens``), what it answers (``Selection``) and what it is (``Pruner``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

VISION_SIGNALS = frozenset(
    {
        "cls_attention",
        "received_attention",
        "object_attention",
        "keys",
        "cls_feature",
        "reader_attention",
        "reader_keys",
        "image_key",
    }
)
TEXT_SIGNALS = frozenset(
    {"image_embeds", "text_embeds", "general_embeds", "text_token_embeds", "general_token_embeds"},
)
SIGNALS = VISION_SIGNALS | TEXT_SIGNALS
"""Optional fields of :class:`VisualTokens` that a method can ask for in ``needs``."""


class PruningError(ValueError):
    """A pruner, a budget or an input that can't work; the message says what to change."""


def signal_name(need: str) -> str:
    """Return the signal of an entry of ``needs``: ``"object_attention@9"`` asks for it at the tower's 9th layer."""
    return need.partition("@")[0]


@dataclass(frozen=True)
class VisualTokens:
    """B items (images, crops or pooled crops) with N visual tokens each, on one device.

    ``features`` and ``projected`` are always there; the rest only if the method asks for it. The feature layer is the
    vision layer whose output enters the projector; the reader is the layer after it.

    Attributes:
        features: (B, N, C) vision hidden states that enter the projector.
        projected: (B, N, D) the same tokens after the projector, in LLM embedding space.
        cls_attention: (B, H, N) softmaxed [CLS]-to-patch attention of the feature layer, float32.
        received_attention: (B, H, N) attention each patch receives in the feature layer, mean over all queries.
        object_attention: (B, H, N) the same at the layer that the method names as ``object_attention@LAYER``.
        keys: (B, N, d) key vectors of the feature layer with bias, unscaled, mean over heads.
        cls_feature: (B, C) hidden state of [CLS] where ``features`` come from.
        reader_attention: (B, N) [CLS]-to-patch attention of the reader, its heads taken as one.
        reader_keys: (B, N, C) key vectors of the reader, heads side by side.
        image_embeds: (B, N, E) the tokens in CLIP's shared space, not normalised.
        text_embeds: (B, M, E) the instruction there, in M pieces of at most 77 CLIP tokens; rows of zeros are padding.
        general_embeds: (B, P, E) the method's ``general_prompts`` there.
        text_token_embeds: (B, M, D) the instruction's LLM token embeddings; rows of zeros are padding.
        general_token_embeds: (B, P, D) mean LLM token embedding of each general prompt.
        image_key: (B,) int64 fingerprint of each item's pixels, the same in any batch.
        image: (B,) int64, the image that each item belongs to; None where every item is an image of its own.
        grid: patch rows and columns with ``rows * columns == N``, or None where tokens form no grid.
        layers: the module that each signal was read from, for error messages.
    """

    features: Tensor
    projected: Tensor | None = None
    cls_attention: Tensor | None = None
    received_attention: Tensor | None = None
    object_attention: Tensor | None = None
    keys: Tensor | None = None
    cls_feature: Tensor | None = None
    reader_attention: Tensor | None = None
    reader_keys: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    general_embeds: Tensor | None = None
    text_token_embeds: Tensor | None = None
    general_token_embeds: Tensor | None = None
    image_key: Tensor | None = None
    image: Tensor | None = None
    grid: tuple[int, int] | None = None
    layers: Mapping[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """N, the number of visual tokens per item."""
        return self.features.shape[1]

    def require(self, signal: str) -> Tensor:
        """Return a signal as it is.

        Raises:
            PruningError: if it was not computed.
        """
        value = getattr(self, signal)
        if value is None:
            raise PruningError(f"this pruner reads `{signal}`, which was not computed; list it in the pruner's `needs`")
        return value

    def finite(self, signal: str) -> Tensor:
        """Return a signal as float32. This reads one number back from the device.

        Raises:
            PruningError: if it was not computed, or holds NaN or infinity, naming the layer it was read from.
        """
        value = self.require(signal).float()
        if not math.isfinite(value.sum()):  # NaN and infinity do not go away in a sum, and one number is read back
            where = f" of {self.layers[signal]}" if signal in self.layers else ""
            raise PruningError(
                f"`{signal}`{where} holds NaN or infinity, so no token can be chosen by it; the vision tower or the "
                "projector overflowed, try bfloat16 or float32"
            )
        return value


@dataclass(frozen=True)
class Selection:
    """What a pruner keeps.

    Attributes:
        indices: (B, K) kept positions, ascending, int64; or one (K_b,) per item when the count adapts to the item.
        merged: pre-projector features in output order, one (K_b, C) per item, for methods that merge; else None.
        origin: for methods that merge, the input token that each output token was made around, in output order, one
            (K_b,) per item; -1 where there is none ([CLS], aggregates of what was dropped).
    """

    indices: Tensor | list[Tensor]
    merged: list[Tensor] | None = None
    origin: list[Tensor] | None = None

    def of(self, item: int) -> Tensor:
        """Return the kept positions (K,) of one item."""
        return self.indices[item]

    def slots_of(self, item: int) -> Tensor:
        """Return the position (K,) of each output token: the one it was made around, else a kept one that is free."""
        indices = self.of(item)
        if self.origin is None:
            return indices
        slots, nowhere = self.origin[item].clone(), self.origin[item] < 0
        slots[nowhere] = indices[~torch.isin(indices, slots)]
        return slots

    def counts(self) -> list[int]:
        """Return how many tokens each item keeps."""
        return [len(row) for row in self.indices]


@runtime_checkable
class Pruner(Protocol):
    """A pruning method with its hyperparameters: a frozen dataclass whose fields are the method's options.

    ``needs`` names the signals it reads, as a class attribute or, where options decide, as a property. A method that
    needs ``general_embeds`` or ``general_token_embeds`` has a field ``general_prompts``.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Signals to compute; nothing else is."""
        ...

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose ``keep`` of the N tokens of every item; 1 <= keep <= N."""
        ...


def keep_all(tokens: VisualTokens) -> Selection:
    """Return every token as it is, unmerged: what each method answers when the budget is N."""
    positions = torch.arange(tokens.count, device=tokens.features.device)
    return Selection(positions.expand(len(tokens.features), -1))
