"""The nearest name, for messages about one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, valid: Iterable[str]) -> str:
    """Return ``", did you mean 'x'?"`` for the nearest of ``valid``, or nothing."""
    close = difflib.get_close_matches(str(name), list(valid), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
