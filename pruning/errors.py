"""The error that everything about pruning raises."""


class PruningError(ValueError):
    """A pruner, a budget or an input that can't work; the message says what to change."""
