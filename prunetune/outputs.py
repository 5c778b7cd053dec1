"""Where commands write: folders that one process uses at a time, and files that are there whole or not at all.

A folder says in ``.prunetune.json`` what it holds and which of its files are ours. Nothing else in it is ever replaced
or deleted. While it is used, ``.prunetune.lock`` is locked; the lock goes with the process, however that ends.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from prunetune.errors import PrunetuneError
from prunetune.screen import say

MARKER = ".prunetune.json"
LOCK = ".prunetune.lock"
SHARED = "PRUNETUNE_LOCK"
"""Environment variable by which a launcher lets its rank 0 into the folder that it has locked."""
_OURS = ".prunetune"
_STAGED, _MOVED = f"{_OURS}-new-", f"{_OURS}-old-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BROKEN = {errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOTCONN}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
# Libraries written in Rust and C++ keep the reason in the message alone; torch's writer does not even know it.
_FULL_IN_WORDS = re.compile(
    r"No space left|Disk quota|File too large|os error (28|27|122)\b|PytorchStreamWriter failed|unexpected pos \d"
)


class OutputError(PrunetuneError):
    """An output that can't be used or written; the message says what is there and what to do."""


@dataclass(frozen=True)
class Kind:
    """What an output folder can hold.

    Attributes:
        name: what messages call it.
        files: the files that a command writes there, relative to the folder: ``#`` is a number, ``*`` anything within
            a name and ``**`` any path. What is named while it is written comes on top, see :meth:`OutputFolder.claim`.
        earlier: by which a folder of a version without ``.prunetune.json`` is recognised: files, each with some text
            that it holds.
        last: the file without which the others are worth nothing; it is removed first and written last.
    """

    name: str
    files: tuple[str, ...] = ()
    earlier: tuple[tuple[str, str], ...] = ()
    last: str = ""

    def wrote_earlier(self, folder: Path) -> bool:
        """Return whether a version without markers wrote this folder."""
        return bool(self.earlier) and all(_holds(folder / name, text) for name, text in self.earlier)

    def below(self, place: str) -> tuple[str, ...]:
        """Return the files of such a folder that lies in ``place`` of another one."""
        return tuple(f"{place}/{name}" for name in self.files)


_TRACKED = (
    "config.yaml",
    "log.jsonl",
    "libraries.log",
    "wandb_id.txt",
    "wandb/latest-run",
    "wandb/debug*.log",
    "wandb/*run-#_#-*/**",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "prunetune.json", "README.md")
CHECKPOINT_FILES = (
    "adapter_*",
    "complete.json",
    "complete.json.partial",
    "global_step#/*.pt",
    "latest",
    "optimizer.pt",
    "README.md",
    "rng_state*.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
    "zero_to_*.py",
)
EVALUATION = Kind(
    "evaluation",
    (*_TRACKED, "manifest.json", "results.jsonl", "results.rank#.jsonl"),
    (("manifest.json", '"frozen_hash"'),),
)
RECALIBRATION = Kind(
    "recalibration",
    (
        *_TRACKED,
        "launch.log",
        "finished.json",
        "finished.json.partial",
        *(f"adapter/{name}" for name in ADAPTER_FILES),
        *(f"checkpoint-#/{name}" for name in CHECKPOINT_FILES),
    ),
    (("config.yaml", "pruning:"), ("log.jsonl", '"learning_rate"')),
)
COMPARISON = Kind(
    "comparison",
    (*_TRACKED, "table.md", "table.csv", "comparison.json", "plot.png"),
    (("table.csv", "tuned_minus_training_free"), ("table.md", "| arm |")),
)
VISUALIZATION = Kind("visualization", ("libraries.log",), (("kept_00.png", "PNG"),))
EXPORT = Kind("export", last="config.json")
DEMO = Kind(
    "demo",
    (
        ".prunetune-demo",  # of earlier versions
        "libraries.log",
        "kept_tokens/kept_#.png",
        *EVALUATION.below("arms/*"),
        *RECALIBRATION.below("recalibrate"),
        *COMPARISON.below("comparison"),
        *VISUALIZATION.below("kept_tokens"),
    ),
    ((".prunetune-demo", ""),),
)


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
            _tell(error, self.path)

    def claim(self, *names: str) -> None:
        """Note names, or patterns, that will be written, so that they are ours from then on.

        Raises:
            OutputError: if there is such a file already which is not ours.
        """
        held = self._now()
        new = [name for name in names if name not in held.files]
        if not new:
            return
        for file in _files(self.path):
            if _matches(file, new) and not _matches(file, held.files):
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
        folder = self.path / f"{_STAGED}{secrets.token_hex(8)}"
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
            _flock(held.lock, share=True)
        return {SHARED: held.token}

    def _now(self) -> _Held:
        assert self._held is not None, "an OutputFolder is used in a with block"
        return self._held

    def _refuse_what_is_read(self) -> None:
        for other in self._reads:
            if other is None or not self.path.exists() or not Path(other).exists():
                continue  # a hub id
            if os.path.samefile(self.path, other):  # through links as well
                raise OutputError(
                    f"{self.path} is the output folder and {other}, which is read; choose another output folder"
                )

    def _open(self) -> None:
        fresh = _make_folder(self.path)
        self._owned()  # before anything is written: a folder of others gets not even a lock
        lock, owner, token = _lock(self.path)
        held = _Held(self.kind.name, [], threading.get_ident(), lock, owner, token, fresh=fresh)
        self._held = held
        try:
            if not (self.path / MARKER).exists():
                held.fresh.insert(0, self.path / MARKER)
            held.files = self._owned()  # once more, now that nobody else can change it
            self._mark(held)
            self.claim(*self.kind.files)
            _recover(self.path)
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
        there = sorted(name for name in os.listdir(self.path) if _is_something(self.path / name))
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
        new = _files(folder)
        for file in new:
            _sync(folder / file)
        last = self.kind.last
        if last in new and _matches(last, held.files):
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
                _remove_empty(self.path, (self.path / file).parent)
            held.files = [name for name in held.files if name in kept]
            self._mark(held)
        _sync(self.path)

    def _leave_no_trace(self, held: _Held) -> None:
        """Take away what was made for an output of which nothing was written."""
        if any(_matches(file, held.files) for file in _files(self.path)):
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
            _flock(held.lock, share=False)
            (self.path / LOCK).unlink(missing_ok=True)
        os.close(held.lock)


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
        temporary = target.parent / f"{_STAGED}{secrets.token_hex(8)}"
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
        _sync(target.parent)


def delete(folder: Path, files: Collection[str], first: str = "") -> None:
    """Delete files of a folder by their patterns, see :class:`Kind`, and folders that are empty without them.

    Args:
        folder: stays, empty or not.
        files: what to delete.
        first: the file without which the others are worth nothing, whenever the process is killed.
    """
    if first:
        (folder / first).unlink(missing_ok=True)
    for file in _files(folder):
        if _matches(file, files):
            (folder / file).unlink()
            _remove_empty(folder, (folder / file).parent)


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
        _recover(folder.parent, folder.name)
        if not (folder / sign).is_file():
            _refuse_names(folder, ours, f"and there is no {sign} that would say it is ours")
        new = folder.parent / f"{_STAGED}{secrets.token_hex(8)}"
        new.mkdir()
        try:
            yield new
            _refuse_names(folder, [file for file in _files(new) if file not in ours], "and prunetune did not write it")
            for file in _files(folder):
                if file not in ours:
                    (new / file).parent.mkdir(parents=True, exist_ok=True)
                    _copy(folder / file, new / file)
            for file in _files(new):
                _sync(new / file)
            # The older one is moved away and not deleted first: killed in between, the next run moves it back.
            old = folder.parent / f"{_MOVED}{secrets.token_hex(8)}-{folder.name}"
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
            _sync(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(new, ignore_errors=True)


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
        _tell(error, path, needed)
        raise


def _tell(error: Exception, path: Path, needed: int = 0) -> None:
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


def _a(kind: str) -> str:
    return f"an {kind}" if kind[:1] in "aeiou" else f"a {kind}"


# ---- files of a folder ------------------------------------------------------------------------------------------


def _make_folder(path: Path) -> list[Path]:
    """Make a folder and those above it; return those that there were not, the innermost first."""
    made = [part for part in (path, *path.parents) if not part.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return made


def _files(folder: Path) -> list[str]:
    """Return all files and links below a folder, as relative paths; linked folders are links."""
    found = []
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in [*names, *links]:
            found.append(Path(root, name).relative_to(folder).as_posix())
    return sorted(found)


def _is_something(path: Path) -> bool:
    """Return whether an entry of a folder is a file, or holds one; our own marks are none."""
    if path.name.startswith(_OURS):
        return False
    if path.is_symlink() or not path.is_dir():
        return True
    return any(_is_something(entry) for entry in path.iterdir())


def _matches(file: str, patterns: Collection[str]) -> bool:
    return any(_pattern(pattern).fullmatch(file) for pattern in patterns)


def _pattern(text: str) -> re.Pattern[str]:
    wild = {"**": ".*", "*": "[^/]*", "#": "[0-9]+"}
    parts = [wild.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*|#)", text)]
    return re.compile("".join(parts))


def _remove_empty(top: Path, folder: Path) -> None:
    """Remove a folder below ``top`` and those above it, as far as they are empty."""
    while folder != top:
        try:
            folder.rmdir()
        except OSError:  # something is in it
            return
        folder = folder.parent


def _recover(folder: Path, name: str | None = None) -> None:
    """Finish what a killed process left: move a folder back that was moved away, drop what was never finished."""
    for moved in folder.glob(f"{_MOVED}*"):
        target = folder / moved.name.removeprefix(_MOVED).partition("-")[2]
        if name not in (None, target.name):
            continue
        if target.exists():
            shutil.rmtree(moved, ignore_errors=True)
        else:
            os.replace(moved, target)
    if name is None:  # the whole folder is locked, so nobody is staging anything
        for staged in folder.glob(f"{_STAGED}*"):
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


def _sync(path: Path) -> None:
    """Have a file or a folder's list of names on the disk before going on."""
    if path.is_symlink():
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _holds(file: Path, text: str) -> bool:
    try:
        with file.open("rb") as stream:
            return text.encode() in stream.read(1 << 16)
    except OSError:
        return False


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


# ---- the lock ---------------------------------------------------------------------------------------------------


def _lock(folder: Path) -> tuple[int, bool, str]:
    """Lock a folder; return the open file, whether this process owns it, and the lock's token.

    Raises:
        OutputError: if another process holds it, naming that one.
    """
    path = folder / LOCK
    token = os.environ.get(SHARED, "")
    launched = bool(token) and _holder(path).get("token") == token
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            taken = _flock(number, share=launched)
        except BlockingIOError:
            os.close(number)
            raise OutputError(_in_use(folder, _holder(path))) from None
        if launched:
            return _kept(number, taken), False, token
        if not taken:
            say(
                f"{folder}: this file system has no locks, so nothing keeps a second run out of the folder; "
                "see to it that there is only one"
            )
            break
        # Its holder may have removed it between our opening and locking; then this is a lock that nobody else sees.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(number)):
                break
        os.close(number)
    token = secrets.token_hex(8)
    try:
        os.ftruncate(number, 0)
        os.pwrite(number, json.dumps(_myself(token)).encode() + b"\n", 0)
    except OSError:  # a full disk
        path.unlink(missing_ok=True)
        os.close(number)
        raise
    return _kept(number, taken), True, token


def _kept(number: int, locked: bool) -> int:
    """Return a lock's open file, or -1 where there are no locks."""
    if locked:
        return number
    os.close(number)
    return -1


def _flock(number: int, share: bool) -> bool:
    """Take a lock; return False where there are none, and raise BlockingIOError if somebody else has it."""
    import fcntl  # which not every system has, and most commands don't need

    try:
        fcntl.flock(number, (fcntl.LOCK_SH if share else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _myself(token: str) -> dict[str, Any]:
    """Return what a lock says of its holder."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:300],
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "token": token,
    }


def _holder(path: Path) -> dict[str, Any]:
    """Return what a lock says, or nothing if it says nothing yet."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _in_use(folder: Path, holder: dict[str, Any]) -> str:
    who = "another process"
    if {"pid", "host", "since", "command"} <= holder.keys():
        who = f"process {holder['pid']} on {holder['host']} since {holder['since']} ({holder['command']})"
    return f"{folder} is in use by {who}; wait until it has ended, stop it, or choose another output folder"


def _close_in_child() -> None:
    """Give the locks up in a forked process: a data loader's worker must not hold its dead parent's."""
    for held in _OPEN.values():
        if held.lock >= 0:
            with suppress(OSError):
                os.close(held.lock)
            held.lock = -1
            held.owner = False


os.register_at_fork(after_in_child=_close_in_child)
