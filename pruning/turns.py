"""One call of a model at a time: hooks belong to the model, and a second thread would run with those of the first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_turns: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_looking = threading.Lock()


@contextmanager
def turn_of(model: nn.Module) -> Iterator[None]:
    """While open, other threads that ask for a turn of this model wait; the same thread may ask again."""
    with _looking:
        own = _turns.setdefault(model, threading.RLock())
    with own:
        yield
