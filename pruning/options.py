"""Checks of a method's options, with messages for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prunetune.pruning.errors import PruningError


def whole(number: float) -> int:
    """Return the floor, where a product such as 0.7 * 2880 = 2015.9999999999998 means 2016."""
    # Far above the rounding of such a product, and far below the share of one token.
    return math.floor(number + 1e-9)


def check_share(name: str, value: float) -> None:
    """Raise PruningError unless ``value`` is a share in [0, 1]."""
    if not 0 <= value <= 1:
        raise PruningError(f"{name} is a share in [0, 1], got {value}")


def check_choice(name: str, value: object, known: Sequence[object]) -> None:
    """Raise PruningError unless ``value`` is one of ``known``."""
    if value not in known:
        choices = ", ".join(map(str, known))
        raise PruningError(f"{name} is one of {choices}, got {value!r}")


def check_least(name: str, value: float, least: float) -> None:
    """Raise PruningError unless ``value`` is at least ``least``."""
    if value < least:
        raise PruningError(f"{name} is at least {least}, got {value}")
