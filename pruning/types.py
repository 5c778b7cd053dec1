"""What a pruner reads (``VisualTokens``), what it answers (``Selection``) and what it is (``Pruner``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from prunetune.pruning.errors import PruningError, Unprojected


@dataclass(frozen=True)
class VisualTokens:
    """B items (images, crops, frames or clips) with N visual tokens each, on one device: one vector per LLM token.

    ``features`` and ``projected`` are always there; of the signals only those that the method asks for. A clip of F
    frames with L tokens each has N = F * L, frame by frame: token i of frame t is t * L + i. Of a clip, a signal that
    belongs to a frame as a whole has one more axis, (B, F, ...); the instruction's belong to the clip.

    Attributes:
        features: (B, N, C) vision hidden states that enter the projector.
        projected: (B, N, D) the same tokens after the projector, in LLM embedding space.
        signals: what else was asked for, by name; :mod:`prunetune.pruning.signals` says what each is.
        image: (B,) int64, the image that each item belongs to, numbered from 0; None where every item is an image.
        grid: rows and columns of an image or a frame, ``frames * rows * columns == N``, or None where tokens form no
            grid.
        layers: the module that each signal was read from, for error messages.
        frames: F, the frames of each clip; 1 for images.
        no_grid: why tokens form no grid where the model is the cause and no setting changes it, for error messages.
    """

    features: Float[Tensor, "B N C"]
    projected: Float[Tensor, "B N D"] | None = None
    signals: Mapping[str, Shaped[Tensor, "B ..."]] = field(default_factory=dict)
    image: Int[Tensor, " B"] | None = None
    grid: tuple[int, int] | None = None
    layers: Mapping[str, str] = field(default_factory=dict)
    frames: int = 1
    no_grid: str = ""

    @property
    def per_frame(self) -> int:
        """L, the number of visual tokens per frame."""
        return self.count // self.frames

    @property
    def count(self) -> int:
        """N, the number of visual tokens per item."""
        return self.features.shape[1]

    def require(self, signal: str) -> Shaped[Tensor, "B ..."]:
        """Return ``features``, ``projected`` or a signal as it is.

        Raises:
            PruningError: if it was not computed.
        """
        if signal == "features":
            return self.features
        value = self.projected if signal == "projected" else self.signals.get(signal)
        if value is None and signal == "projected":
            raise Unprojected("this pruner chooses by the projector's output; set engine.project_kept: false")
        if value is None:
            raise PruningError(f"this pruner reads `{signal}`, which was not computed; list it in the pruner's `needs`")
        return value

    def finite(self, signal: str) -> Float[Tensor, "B ..."]:
        """Return ``features``, ``projected`` or a signal as float32. This reads one number back from the device.

        Raises:
            PruningError: if it was not computed, or holds NaN or infinity, naming the layer it was read from.
        """
        value = self.require(signal).float()  # half precision ties where float32 does not
        # NaN and infinity do not go away in a sum: one number is read back, and no mask as large as the signal is made.
        if not math.isfinite(value.sum()):
            where = f" of {self.layers[signal]}" if signal in self.layers else ""
            raise PruningError(
                f"`{signal}`{where} holds NaN or infinity, so no token can be chosen by it; the vision tower or the "
                "projector overflowed, try bfloat16 or float32"
            )
        return value

    def grid_for(self, use: str) -> tuple[int, int]:
        """Return the rows and columns of the grid.

        Args:
            use: what a method does with a patch grid, for the message, such as "hiprune keeps neighbours on".

        Raises:
            PruningError: if the tokens form no grid, with the cause.
        """
        if self.grid is not None:
            return self.grid
        if self.no_grid:
            raise PruningError(
                f"{use} a patch grid, and this image has none: {self.no_grid}; choose a method that needs no grid"
            )
        raise PruningError(
            f"{use} a patch grid, but these tokens form none; set scope: item, or choose a method that needs no grid"
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> VisualTokens:
        """Return the same items with every tensor changed, for example moved to another device."""

        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return replace(
            self,
            features=change(self.features),
            projected=changed(self.projected),
            signals={name: change(value) for name, value in self.signals.items()},
            image=changed(self.image),
        )


@dataclass(frozen=True)
class Selection:
    """What a pruner keeps.

    Attributes:
        indices: (B, K) kept positions, ascending, int64; or one (K_b,) per item when the count adapts to the item.
        merged: pre-projector features in output order, one (K_b, C) per item, for methods that merge; else None.
        origin: for methods that merge, the input token that each output token was made around, in output order, one
            (K_b,) per item; -1 where there is none ([CLS], aggregates of what was dropped).
        mixing: for methods that merge after the projector: how much of every projected token each output takes, one
            (K_b, N) float32 per item, in output order; else None. Weights and not features, so that gradients reach
            the projector through them although the choice carries none: the mean of projected tokens is not the
            projection of their mean.
        in_order: whether outputs fill the kept slots in output order; else each stands where it was made.
        notes: what the method counted on the way, a number (B,) per item by name, for statistics: on the device, so
            that taking them down waits for nothing.
    """

    indices: Int[Tensor, "B _K"] | list[Int[Tensor, " _K"]]
    merged: list[Float[Tensor, "_K C"]] | None = None
    origin: list[Int[Tensor, " _K"]] | None = None
    mixing: list[Float[Tensor, "_K N"]] | None = None
    in_order: bool = False
    notes: Mapping[str, Shaped[Tensor, " B"]] = field(default_factory=dict)

    def of(self, item: int) -> Int[Tensor, " K"]:
        """Return the kept positions (K,) of one item."""
        return self.indices[item]

    def slots_of(self, item: int) -> Int[Tensor, " K"]:
        """Return the position (K,) of each output token: the one it was made around, else a kept one that is free.

        Indices ``[1, 3, 4]`` with the origins ``[4, 1, -1]`` give ``[4, 1, 3]``; ``in_order`` they are ``[1, 3, 4]``.
        """
        indices = self.of(item)
        if self.origin is None or self.in_order:
            return indices
        slots = self.origin[item].clone()
        # Whatever has no origin was given a position of its own, so there are as many free ones as it takes.
        free = indices[~torch.isin(indices, slots)]
        slots[slots < 0] = free
        return slots

    def counts(self) -> list[int]:
        """Return how many tokens each item keeps."""
        return [len(row) for row in self.indices]

    def rows(self, rows: Sequence[int]) -> Selection:
        """Return what is kept of some of the items, in the order of ``rows``."""
        if list(rows) == list(range(len(self.indices))):
            return self
        if isinstance(self.indices, Tensor):
            indices: Tensor | list[Tensor] = torch.stack([self.indices[row] for row in rows])
        else:
            indices = [self.indices[row] for row in rows]

        def picked(values: list[Tensor] | None) -> list[Tensor] | None:
            return None if values is None else [values[row] for row in rows]

        notes = {name: torch.stack([values[row] for row in rows]) for name, values in self.notes.items()}
        return replace(
            self,
            indices=indices,
            merged=picked(self.merged),
            origin=picked(self.origin),
            mixing=picked(self.mixing),
            notes=notes,
        )


@runtime_checkable
class Pruner(Protocol):
    """A pruning method with its hyperparameters: a frozen dataclass whose fields are the method's options.

    ``needs`` names the signals it reads, as a class attribute or, where options decide, as a property. A method that
    needs ``general_embeds`` or ``general_token_embeds`` has a field ``general_prompts``. A method registered with
    ``video=True`` is called with whole clips, and with an image as a clip of one frame.
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
    # Unmerged also by methods that merge: with all tokens kept the model's input is the stock model's bit for bit.
    positions = torch.arange(tokens.count, device=tokens.features.device)
    return Selection(positions.expand(len(tokens.features), -1))
