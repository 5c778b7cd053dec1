"""The error that people can cause."""


class PrunetuneError(ValueError):
    """Something a user can put right: the message says what was wrong, what was expected and what to do.

    The command line prints it as one line; everything else is a bug and shows its traceback.
    """
