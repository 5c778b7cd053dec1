"""Files and folders that are there whole or not at all, whenever the process is killed or the disk is full."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from prunetune.outputs.errors import OutputError, writing
from prunetune.outputs.listing import MOVED, STAGED, files_of, matches, remove_empty


def write_text(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all, whenever the process is killed or the disk is full.

    An existing file keeps its permissions, and a link stays one.

    Raises:
        OutputError: if it can't be written; the older file is untouched then.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file as :func:`write_text` does."""
    with writing(path, len(data)):
        target = path.resolve()
        # In the same folder: within one file system a replacement is atomic, across two it would be a copy.
        temporary = target.parent / f"{STAGED}{secrets.token_hex(8)}"
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as stream:
                if target.exists():
                    os.fchmod(stream.fileno(), target.stat().st_mode & 0o7777)
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(target.parent)


def delete(folder: Path, files: Collection[str], first: str = "") -> None:
    """Delete files of a folder by their patterns, see :class:`Kind`, and folders that are empty without them.

    Args:
        folder: stays, empty or not.
        files: what to delete.
        first: the file without which the others are worth nothing, whenever the process is killed.
    """
    if first:
        (folder / first).unlink(missing_ok=True)
    for file in files_of(folder):
        if matches(file, files):
            (folder / file).unlink()
            remove_empty(folder, (folder / file).parent)


@contextmanager
def replaced_folder(folder: Path, ours: Collection[str], sign: str) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``folder`` when the block ends, and not if it fails.

    Files of others in the older folder are carried over, and none of them is replaced.

    Args:
        folder: destination.
        ours: names that the older folder may have from us.
        sign: the one of them by which the older folder is known to be ours.

    Raises:
        OutputError: if a file of others has a name of ours, or the disk is full.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        recover(folder.parent, folder.name)
        if not (folder / sign).is_file():
            _refuse_names(folder, ours, f"and there is no {sign} that would say it is ours")
        new = folder.parent / f"{STAGED}{secrets.token_hex(8)}"
        new.mkdir()
        try:
            yield new
            of_others = [file for file in files_of(new) if file not in ours]
            _refuse_names(folder, of_others, "and prunetune did not write it")
            for file in files_of(folder):
                if file not in ours:
                    (new / file).parent.mkdir(parents=True, exist_ok=True)
                    _copy(folder / file, new / file)
            for file in files_of(new):
                sync(new / file)
            # The older one is moved away and not deleted first: killed in between, the next run moves it back.
            old = folder.parent / f"{MOVED}{secrets.token_hex(8)}-{folder.name}"
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
            sync(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def recover(folder: Path, name: str | None = None) -> None:
    """Finish what a killed process left: move a folder back that was moved away, drop what was never finished."""
    for moved in folder.glob(f"{MOVED}*"):
        target = folder / moved.name.removeprefix(MOVED).partition("-")[2]
        if name not in (None, target.name):
            continue
        if target.exists():
            shutil.rmtree(moved, ignore_errors=True)
        else:
            os.replace(moved, target)
    if name is None:  # the whole folder is locked, so nobody is staging anything
        for staged in folder.glob(f"{STAGED}*"):
            if staged.is_dir():
                shutil.rmtree(staged, ignore_errors=True)
            else:
                staged.unlink(missing_ok=True)


def _refuse_names(folder: Path, names: Collection[str], why: str) -> None:
    """Raise OutputError if one of some names is there."""
    for name in names:
        if (folder / name).exists():
            raise OutputError(f"{folder / name} is in the way, {why}; move it, or choose another folder")


def _copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that can't be had."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def sync(path: Path) -> None:
    """Have a file or a folder's list of names on the disk before going on."""
    if path.is_symlink():
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
