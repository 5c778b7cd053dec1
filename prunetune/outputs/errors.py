"""A full or read-only disk, a file where a folder should be: said in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prunetune.errors import PrunetuneError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BROKEN = {errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOTCONN}
# Libraries written in Rust and C++ keep the reason in the message alone; torch's writer does not even know it.
_FULL_IN_WORDS = re.compile(
    r"No space left|Disk quota|File too large|os error (28|27|122)\b|PytorchStreamWriter failed|unexpected pos \d"
)


class OutputError(PrunetuneError):
    """An output that can't be used or written; the message says what is there and what to do."""


@contextmanager
def writing(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn what a full or read-only disk does to the block into an OutputError.

    Args:
        path: the file or folder that is written.
        needed: bytes, if known.
    """
    try:
        yield
    except Exception as error:
        tell(error, path, needed)
        raise


def tell(error: Exception, path: Path, needed: int = 0) -> None:
    """Raise an OutputError if an error means that ``path`` could not be written, and return if not."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, PrunetuneError):
            return  # it was told already
        told = _told(seen, path, needed)
        if told is not None:
            raise OutputError(told) from error
        seen = seen.__cause__ or seen.__context__


def _told(error: BaseException, path: Path, needed: int) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    if number in _FULL or (number is None and _FULL_IN_WORDS.search(str(error))):
        wanted = f", {_size(needed)} needed" if needed else ""
        reason = os.strerror(number) if number else "the disk is full"
        return (
            f"{path} can't be written: {reason} ({_size(_free(path))} free{wanted}); what was complete before is "
            "untouched. Make room and run the same command again"
        )
    if not isinstance(error, OSError):
        return None
    # Writing to an open file fails without a name.
    if not _is_below(error.filename, path) and not (error.filename is None and number in _BROKEN):
        return None
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{_first_file(path)} is a file, and a folder is needed; choose another output"
    if isinstance(error, FileNotFoundError):
        gone = "its folder is gone; nothing else may delete or move it during a run"
        return None if path.exists() else f"{path} can't be written: {gone}"
    return f"{path} can't be written: {error.strerror}; choose another output, or change its permissions"


def _is_below(filename: Any, path: Path) -> bool:
    """Return whether an error's file is the output, in it, or above it."""
    if not isinstance(filename, str | os.PathLike):
        return False
    named, output = Path(filename).absolute(), path.absolute()
    return named.is_relative_to(output) or output.is_relative_to(named) or named.parent == output.resolve().parent


def _first_file(path: Path) -> Path:
    """Return the part of a path that is a file."""
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            return part
    return path


def _free(path: Path) -> int:
    for part in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(part).free
    return 0


def _size(count: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"
