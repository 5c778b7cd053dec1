"""What a pruner reads (``VisualTokens``), what it answers (``Selection``) and what it is (``Pruner``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

SIGNALS = frozenset({"cls_attention", "image_key"})
"""Optional fields of :class:`VisualTokens` that a method can ask for in ``needs``."""


class PruningError(ValueError):
    """A pruner, a budget or an input that can't work; the message says what to change."""


@dataclass(frozen=True)
class VisualTokens:
    """B items (images or crops) with N visual tokens each, on one device.

    Attributes:
        features: (B, N, C) vision hidden states that enter the projector.
        projected: (B, N, D) the same tokens after the projector, in LLM embedding space.
        cls_attention: (B, H, N) softmaxed [CLS]-to-patch attention of the feature layer, float32; only if asked for.
        image_key: (B,) int64 fingerprint of each item's pixels, the same in any batch; only if asked for.
        grid: patch rows and columns with ``rows * columns == N``, or None where tokens form no grid.
    """

    features: Tensor
    projected: Tensor | None = None
    cls_attention: Tensor | None = None
    image_key: Tensor | None = None
    grid: tuple[int, int] | None = None

    @property
    def count(self) -> int:
        """N, the number of visual tokens per item."""
        return self.features.shape[1]

    def require(self, signal: str) -> Tensor:
        """Return a signal.

        Raises:
            PruningError: if it was not computed, or holds NaN or infinity.
        """
        value = getattr(self, signal)
        if value is None:
            raise PruningError(f"this pruner reads `{signal}`, which was not computed; list it in the pruner's `needs`")
        return value


@dataclass(frozen=True)
class Selection:
    """What a pruner keeps.

    Attributes:
        indices: (B, K) kept positions, ascending, int64; or one (K_b,) per item when the count adapts to the item.
        merged: pre-projector features in output order, one (K_b, C) per item, for methods that merge; else None.
    """

    indices: Tensor | list[Tensor]
    merged: list[Tensor] | None = None

    def of(self, item: int) -> Tensor:
        """Return the kept positions (K,) of one item."""
        return self.indices[item]

    def counts(self) -> list[int]:
        """Return how many tokens each item keeps."""
        return [len(row) for row in self.indices]


@runtime_checkable
class Pruner(Protocol):
    """A pruning method with its hyperparameters: a frozen dataclass whose fields are the method's options."""

    needs: ClassVar[frozenset[str]]

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose ``keep`` of the N tokens of every item; 1 <= keep <= N."""
        ...


def check_finite(value: Tensor, what: str) -> Tensor:
    """Return ``value`` as float32.

    Raises:
        PruningError: if it holds NaN or infinity, naming ``what``. This reads one number back from the device.
    """
    value = value.float()
    if not bool(torch.isfinite(value).all()):
        raise PruningError(f"{what} holds NaN or infinity; the vision tower overflowed, try bfloat16 or float32")
    return value
