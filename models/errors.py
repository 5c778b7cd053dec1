"""The error that checkpoints and adapters raise."""

from prunetune.pruning.errors import PruningError


class CheckpointError(PruningError):
    """A checkpoint that is missing, broken or made for something else."""
