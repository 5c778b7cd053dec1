"""The error that everything about pruning raises."""

from prunetune.errors import PrunetuneError


class PruningError(PrunetuneError):
    """A pruner, a budget or an input that can't work; the message says what to change."""


class Unprojected(PruningError):
    """A method chooses by the projector's output, and only what it keeps was to be projected."""


def not_in(backend: str, why: str) -> PruningError:
    """Return the error of what a backend of generation can't do as the plain one does it."""
    return PruningError(f"backend: {backend} {why}; set backend: plain")
