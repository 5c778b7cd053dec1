"""The error that benchmarks raise."""

from prunetune.errors import PrunetuneError


class TaskError(PrunetuneError):
    """A benchmark, a file of one or saved predictions that can't be used; the message says what to do."""


# A kind of its own, since it says that one layout is not there: another one of the same benchmark may be.
class MissingFile(TaskError):
    """A published file that is not there."""
