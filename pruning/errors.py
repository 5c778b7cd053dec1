"""The error that everything about pruning raises."""

from prunetune.errors import PrunetuneError


class PruningError(PrunetuneError):
    """A pruner, a budget or an input that can't work; the message says what to change."""
