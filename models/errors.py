"""The errors that checkpoints, adapters and feature caches raise."""

from prunetune.pruning.errors import PruningError


class CheckpointError(PruningError):
    """A checkpoint that is missing, broken or made for something else."""


class FeatureError(PruningError):
    """A feature cache that is missing, damaged or made for something else."""
