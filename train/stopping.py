"""Stopping a run on a signal: what a rank does when it is told, and what its exit status says."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading

import psutil

REQUEUE = 75
"""Exit status of a run that a signal stopped and that goes on when it is started again: EX_TEMPFAIL of sysexits.h."""
INTERRUPTED = 130
"""What shells report for Ctrl-C."""
STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})


class StopRequest:
    """Whether this rank was told to stop.

    A thread listens, because Python calls a handler only between two of its own instructions, and a rank may sit in a
    collective for as long as its peers let it wait. Python writes every signal's number to a pipe at once, though.

    Attributes:
        asked: set by SIGTERM, SIGUSR1 or a first SIGINT.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._interrupted = False

    def listen(self) -> None:
        """Take the signals from now on; those that came while the launcher held them back count as well."""
        read, write = os.pipe()
        os.set_blocking(write, False)  # as Python demands of it
        threading.Thread(target=self._hear, args=(read,), daemon=True).start()
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, _do_nothing)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        os.register_at_fork(after_in_child=_outlive_the_signal)
        atexit.register(_end_children)

    def finish(self) -> None:
        """Take no more signals: one that comes while Python shuts down would change the exit status."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def hear(self, number: int) -> None:
        """Note a signal; leave at once where waiting is of no use."""
        if number == signal.SIGTERM and a_sibling_has_ended():
            os._exit(128 + signal.SIGTERM)  # the launcher clears up after a rank that failed
        if number == signal.SIGINT:
            if self._interrupted:
                os._exit(INTERRUPTED)
            self._interrupted = True
        if number in STOP_SIGNALS:
            self.asked.set()

    def _hear(self, pipe: int) -> None:
        while data := os.read(pipe, 1):
            self.hear(data[0])


def a_sibling_has_ended() -> bool:
    """Return whether another rank of this launcher is no more: then no collective would ever come to an end.

    ``deepspeed`` and ``torchrun`` send SIGTERM for that, too, and wait 30 seconds for every rank that goes on.
    """
    expected = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    if expected is None:
        return False
    try:
        siblings = psutil.Process(os.getppid()).children()
        alive = [sibling for sibling in siblings if sibling.status() != psutil.STATUS_ZOMBIE]
    except psutil.Error:
        return True  # the launcher itself or one of them has just ended
    return len(alive) < int(expected)


def _do_nothing(number: int, frame: object) -> None:
    """Stand where the default action would end the process; the thread does what there is to do."""


def _end_children() -> None:
    """End data loading processes that are left at the end; they do not hear the SIGTERM that Python sends them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler takes their end for a failure
    for child in multiprocessing.active_children():
        child.kill()


def _outlive_the_signal() -> None:
    """Let a data loading process go on when a scheduler tells every process: its rank still needs batches."""
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
