"""Chat templates tokenized with the assistant's tokens marked, without transformers' search for them.

transformers compares every token with every span in Python: 80 of the 90 ms that a sample took. Comparing them all at
once gives the same mask.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np


def with_fast_masks(processor: Any) -> Any:
    """Return a copy of a processor whose ``apply_chat_template`` marks the assistant's tokens at once.

    One method of the copy is replaced, none of its class. A transformers that no longer calls it marks them by itself.
    """
    own = copy.copy(processor)
    own._adjust_assistant_masks_indices = _marked
    return own


def for_text_alone(processor: Any) -> Any:
    """Return such a copy that takes text with places for pictures and no pictures, which stock processors refuse."""
    own = with_fast_masks(processor)
    own.validate_inputs = _accept
    return own


def token_mask(offsets: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Return which tokens overlap a span: bool (L,).

    Tokens at [[0, 3], [3, 5], [5, 9]] and the span [4, 6] give [False, True, True].

    Args:
        offsets: start and end of every token in the text, (L, 2).
        spans: start and end of what is marked, (S, 2).
    """
    begins = offsets[:, :1] < spans[None, :, 1]  # (L, S)
    ends = offsets[:, 1:] > spans[None, :, 0]
    return np.any(begins & ends, axis=1)


def _accept(**inputs: Any) -> None:
    """Take any inputs."""


def _marked(encoded: Any, spans: Sequence[Sequence[Sequence[int]]]) -> Any:
    """Put ``assistant_masks`` in a processor's output, in the place of transformers' own method.

    Args:
        encoded: with ``offset_mapping``, and ``text_replacement_offsets`` where placeholders were expanded.
        spans: for each text what is marked, in the letters of the text before placeholders were expanded.
    """
    offsets = encoded.pop("offset_mapping")
    expanded = encoded.pop("text_replacement_offsets", None) or [[]] * len(offsets)
    masks = []
    for row, of_text in enumerate(spans):
        moved = _moved(np.asarray(of_text, dtype=np.int64).reshape(-1, 2), expanded[row])
        masks.append(token_mask(np.asarray(offsets[row]), moved).astype(np.int64).tolist())
    encoded["assistant_masks"] = masks
    return encoded


def _moved(spans: np.ndarray, replacements: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return spans (S, 2) moved by the letters that placeholders before them gained."""
    ends = [replacement["span"][1] for replacement in replacements]
    gained = [0] + [replacement["new_span"][1] - replacement["span"][1] for replacement in replacements]
    return spans + np.asarray(gained)[np.searchsorted(ends, spans, side="right")]
