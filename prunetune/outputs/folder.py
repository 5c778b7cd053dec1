"""A folder that a command writes to: checked, marked and locked while it is used."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from prunetune.outputs.errors import OutputError, tell, writing
from prunetune.outputs.files import delete, recover, sync, write_text
from prunetune.outputs.kinds import Kind
from prunetune.outputs.listing import STAGED, files_of, is_something, make_folder, matches, remove_empty
from prunetune.outputs.lock import LOCK, SHARED, flock, lock_folder

MARKER = ".prunetune.json"


@dataclass
class _Held:
    """A folder that this process has open, however often."""

    kind: str
    files: list[str]
    thread: int
    lock: int
    owner: bool
    token: str
    depth: int = 1
    fresh: list[Path] = field(default_factory=list)
    """What there was not before: the marker, and the folder itself; taken away again if nothing comes of it."""


_OPEN: dict[Path, _Held] = {}


class OutputFolder:
    """A folder that a command writes to, for a ``with``: made, checked, and locked until the block ends.

    Within one thread a folder may be opened again for the same kind of output; the outermost block holds the lock. A
    full or read-only disk that anything in the block meets ends as one line.

    Args:
        path: the folder; it is made if there is none.
        kind: what is written there.
        overwrite: delete what is ours in it first. Files of others stay in any case, and none of them is replaced.
        reads: folders that the command reads, none of which may be this one.

    Raises:
        OutputError: if it is a file, read-only, in use, of another kind, or not empty and not ours.
    """

    def __init__(
        self, path: str | Path, kind: Kind, overwrite: bool = False, reads: Sequence[str | Path | None] = ()
    ) -> None:
        self.path = Path(path)
        self.kind = kind
        self.overwrite = overwrite
        self._reads = reads
        self._held: _Held | None = None

    def __enter__(self) -> OutputFolder:
        held = _OPEN.get(self.path.resolve())
        if held is not None and (held.kind, held.thread) == (self.kind.name, threading.get_ident()):
            held.depth += 1
            self._held = held
            return self
        self._refuse_what_is_read()
        with writing(self.path):
            self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        held = self._now()
        self._held = None
        held.depth -= 1
        if held.depth == 0:
            if error is not None:
                self._leave_no_trace(held)
            self._release(held)
        if isinstance(error, Exception):
            tell(error, self.path)

    def claim(self, *names: str) -> None:
        """Note names, or patterns, that will be written, so that they are ours from then on.

        Raises:
            OutputError: if there is such a file already which is not ours.
        """
        held = self._now()
        new = [name for name in names if name not in held.files]
        if not new:
            return
        for file in files_of(self.path):
            if matches(file, new) and not matches(file, held.files):
                raise OutputError(
                    f"{self.path / file} is in the way: {self.kind.name} would replace it, and prunetune did not write "
                    "it; move it, or choose another output folder"
                )
        held.files += new
        self._mark(held)

    def clear(self) -> None:
        """Delete the files that are ours, and folders that are empty without them."""
        with writing(self.path):
            delete(self.path, self._now().files)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of this folder, whole or not at all."""
        self.claim(name)
        write_text(self.path / name, text)

    @contextmanager
    def staged(self, whole: bool = False) -> Iterator[Path]:
        """Yield an empty folder for files that are moved into this one when the block ends, and not if it fails.

        Args:
            whole: they are all that this folder is about: what was claimed before and is not among them is deleted.

        Raises:
            OutputError: if one would replace a file that is not ours, or the disk is full.
        """
        folder = self.path / f"{STAGED}{secrets.token_hex(8)}"
        with writing(self.path):
            folder.mkdir()
            try:
                yield folder
                self._put(folder, whole)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def shared(self) -> dict[str, str]:
        """Let the ranks that this process launches in; return what their environment needs for it.

        Each of the two keeps the others out: the ranks go on in their folder even if their launcher is killed.
        """
        held = self._now()
        if held.lock >= 0:
            flock(held.lock, share=True)
        return {SHARED: held.token}

    def _now(self) -> _Held:
        assert self._held is not None, "an OutputFolder is used in a with block"
        return self._held

    def _refuse_what_is_read(self) -> None:
        for other in self._reads:
            # Of a name that no disk can have this is False; Path.exists would raise.
            if other is None or not os.path.exists(self.path) or not os.path.exists(other):
                continue  # a hub id
            if os.path.samefile(self.path, other):  # through links as well
                raise OutputError(
                    f"{self.path} is the output folder and {other}, which is read; choose another output folder"
                )

    def _open(self) -> None:
        fresh = make_folder(self.path)
        self._owned()  # before anything is written: a folder of others gets not even a lock
        lock, owner, token = lock_folder(self.path)
        held = _Held(self.kind.name, [], threading.get_ident(), lock, owner, token, fresh=fresh)
        self._held = held
        try:
            if not (self.path / MARKER).exists():
                held.fresh.insert(0, self.path / MARKER)
            held.files = self._owned()  # once more, now that nobody else can change it
            self._mark(held)
            self.claim(*self.kind.files)
            recover(self.path)
            if self.overwrite and owner:
                self.clear()
        except BaseException:
            self._held = None
            self._leave_no_trace(held)
            self._release(held)
            raise
        _OPEN[self.path.resolve()] = held

    def _owned(self) -> list[str]:
        """Return which files are ours.

        Raises:
            OutputError: if the folder is not for this kind of output.
        """
        marker = self.path / MARKER
        if marker.is_file():
            kind, files = _read_marker(marker)
            if kind != self.kind.name:
                raise OutputError(f"{self.path} holds {_a(kind)}, not {_a(self.kind.name)}; choose another folder")
            return files
        if self.kind.wrote_earlier(self.path):
            return list(self.kind.files)
        there = sorted(name for name in os.listdir(self.path) if is_something(self.path / name))
        if there and not self.overwrite:
            shown = ", ".join(there[:5]) + (f" and {len(there) - 5} more" if len(there) > 5 else "")
            raise OutputError(
                f"{self.path} is not empty and holds no {self.kind.name} of prunetune, but {shown}; "
                "choose another output folder, or give --overwrite, which writes beside these files and changes none"
            )
        return []

    def _mark(self, held: _Held) -> None:
        content = {"format": 1, "kind": held.kind, "files": held.files}
        write_text(self.path / MARKER, json.dumps(content, indent=1) + "\n")

    def _put(self, folder: Path, whole: bool) -> None:
        """Move staged files into place; the folder's ``last`` goes first and comes last."""
        held = self._now()
        new = files_of(folder)
        for file in new:
            sync(folder / file)
        last = self.kind.last
        if last in new and matches(last, held.files):
            (self.path / last).unlink(missing_ok=True)
        self.claim(*new)
        for file in sorted(new, key=lambda name: name == last):
            target = self.path / file
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / file, target)
        if whole:
            kept = {*new, *self.kind.files}
            for file in [name for name in held.files if name not in kept]:
                (self.path / file).unlink(missing_ok=True)
                remove_empty(self.path, (self.path / file).parent)
            held.files = [name for name in held.files if name in kept]
            self._mark(held)
        sync(self.path)

    def _leave_no_trace(self, held: _Held) -> None:
        """Take away what was made for an output of which nothing was written."""
        if any(matches(file, held.files) for file in files_of(self.path)):
            return
        for path in held.fresh:
            with suppress(OSError):
                if path.name == MARKER:
                    path.unlink()
                else:
                    if held.owner:
                        (path / LOCK).unlink(missing_ok=True)
                    path.rmdir()

    def _release(self, held: _Held) -> None:
        _OPEN.pop(self.path.resolve(), None)
        if held.lock < 0:
            if held.owner:
                (self.path / LOCK).unlink(missing_ok=True)
            return
        # Removed by the last of a launcher and its rank, and while it is still locked: who opened it meanwhile sees
        # that it is another file, and starts again.
        with suppress(OSError):
            flock(held.lock, share=False)
            (self.path / LOCK).unlink(missing_ok=True)
        os.close(held.lock)


def _a(kind: str) -> str:
    return f"an {kind}" if kind[:1] in "aeiou" else f"a {kind}"


def _read_marker(path: Path) -> tuple[str, list[str]]:
    """Return kind and files."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind, files, version = content["kind"], content["files"], content["format"]
        if version != 1 or not isinstance(kind, str) or not all(isinstance(name, str) for name in files):
            raise ValueError("another version wrote it")
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path} can't be read ({error or 'it is no marker'}), so nothing says which files of the folder are ours; "
            "choose another output folder"
        ) from None
    return kind, list(files)


def _close_in_child() -> None:
    """Give the locks up in a forked process: a data loader's worker must not hold its dead parent's."""
    for held in _OPEN.values():
        if held.lock >= 0:
            with suppress(OSError):
                os.close(held.lock)
            held.lock = -1
            held.owner = False


os.register_at_fork(after_in_child=_close_in_child)
