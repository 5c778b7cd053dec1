"""What the user is shown: our lines on the screen, the libraries' in a file.

The ranks of a launch share one pipe with DeepSpeed, W&B and setuptools. What is ours stands there between two control
characters, so that the process that launched them can show it and write everything else to a log file.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

BEGIN, END = b"\x1e", b"\x1f"
LIBRARIES = [
    "ContinuousBatchingLogger",  # of transformers
    "accelerate",
    "datasets",
    "deepspeed",
    "huggingface_hub",
    "peft",
    "py.warnings",
    "torch",
    "transformers",
    "wandb",
]


class Screen(io.TextIOBase):
    """A stream to the screen, for lines and progress bars; marked for a launcher that asked for it."""

    marked = False
    encoding = "utf-8"  # what bars are drawn with

    def write(self, text: str) -> int:
        """Write at once; one call is one piece, which no other rank's output can cut."""
        if self.marked:
            os.write(1, BEGIN + text.encode() + END)
        else:
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand on what is buffered."""
        if not self.marked:
            sys.stderr.flush()


SCREEN = Screen()


def say(text: str) -> None:
    """Show a line."""
    if SCREEN.marked:
        SCREEN.write(f"{text}\n")
    else:
        print(text, flush=True)


@dataclass
class LossyLog:
    """A log that a full disk makes incomplete, and does not stop: what runs meets the same disk, and says so itself.

    Attributes:
        stream: unbuffered, or what could not be written would be tried again as it is closed.
        lost: bytes that could not be written.
    """

    stream: IO[bytes]
    lost: int = 0

    def write(self, data: bytes) -> None:
        """Write what fits."""
        try:
            written = self.stream.write(data) or 0
        except OSError:
            written = 0
        self.lost += len(data) - written


def show_and_log(pipe: IO[bytes], log: LossyLog) -> str:
    """Show what is marked and write the rest to a log, until the pipe ends; return what was shown."""
    shown: list[str] = []
    held = b""
    while chunk := os.read(pipe.fileno(), 65536):
        held += chunk
        held = _sort(held, shown, log)
    log.write(held)
    return "".join(shown)


def _sort(data: bytes, shown: list[str], log: LossyLog) -> bytes:
    """Show and log what is complete, and return the rest: a marked piece whose end has not come yet."""
    while True:
        plain, begin, rest = data.partition(BEGIN)
        log.write(plain)
        if not begin:
            return b""
        ours, end, data = rest.partition(END)
        if not end:
            return BEGIN + ours
        text = ours.decode(errors="replace")
        shown.append(text)
        sys.stdout.write(text)
        sys.stdout.flush()


@contextmanager
def libraries_in(file: Path) -> Iterator[None]:
    """While open, the libraries' log lines and warnings go to a file; if there are any, its name is told at the end."""
    importlib.import_module("transformers.utils.logging").get_logger()  # adds a handler of its own when first used
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    before = {}
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        before[name] = (logger.handlers, logger.propagate)
        logger.handlers, logger.propagate = [handler], False
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for name, (handlers, propagate) in before.items():
            logging.getLogger(name).handlers, logging.getLogger(name).propagate = handlers, propagate
        handler.close()
        if file.exists():
            say(f"the libraries' messages: {file}")
