"""The error that benchmarks raise."""

from prunetune.errors import PrunetuneError


class TaskError(PrunetuneError):
    """A benchmark, a file of one or saved predictions that can't be used; the message says what to do."""


class MissingFile(TaskError):
    """A published file that is not there."""
