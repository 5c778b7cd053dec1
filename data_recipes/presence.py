"""Which images are there: from listings of their folders, not by asking the file system for every one."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunetune.data_recipes import store

SETTLED = 2_000_000_000
"""Nanoseconds that a folder must have been left alone before its listing is kept: clocks of file systems are coarse,
and a file that comes within the same tick changes nothing that could be compared later."""
FORMAT = 1


@dataclass
class _Folder:
    """What a folder holds.

    Attributes:
        state: inode and time of change in nanoseconds; None where there is no such folder, empty where it may not
            be looked at.
        names: files in it, and folders (of frames, for videos).
        folders: which of the names are folders.
        links: which of the names are links; what they lead to is not the folder's to say.
    """

    state: list[int] | None
    names: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)


def missing_files(
    root: Path, references: Sequence[str], exists: Callable[[str], bool], or_folder: bool = False
) -> set[str]:
    """Return the references that are not there.

    Each folder that a reference names is listed once, and the result is kept beside the Arrow cache: as long as inode
    and time of change of all these folders stay, a later call asks for those alone. Links are asked for every time.

    Args:
        root: folder that references are relative to.
        references: paths such as ``gqa/images/1.jpg``, each once.
        exists: decides one reference; it is asked for links, for names that no listing shows, and for paths that
            a listing can't answer, such as ``a//b``.
        or_folder: a folder of that name counts, too (frames of a video).
    """
    key = hashlib.sha256(json.dumps([FORMAT, str(root.resolve()), or_folder]).encode())
    key.update("\0".join(references).encode(errors="surrogatepass"))
    name = f"presence-{key.hexdigest()[:40]}.json"
    known = _kept(name, root)
    if known is not None:
        return {*known["missing"], *(path for path in known["links"] if not exists(path))}
    folders: dict[str, _Folder] = {}
    missing, links = set(), []
    for reference in references:
        parent, _, file = reference.rpartition("/")
        if not _plain(reference):
            links.append(reference)  # asked for every time, as links are
            continue
        folder = folders.get(parent)
        if folder is None:
            folder = folders[parent] = _listed(root / parent)
        if file in folder.links:
            links.append(reference)
            continue
        if file in folder.names and (or_folder or file not in folder.folders):
            continue
        # A file system that takes A for a, or two spellings of an accent for one, knows better than the listing.
        if folder.state is None or not exists(reference):
            missing.add(reference)
    gone = {reference for reference in links if not exists(reference)}
    _keep(name, folders, sorted(missing), links)
    return missing | gone


def _plain(reference: str) -> bool:
    """Return whether a path is spelled so that its last part is a name in the folder that the rest names."""
    parts = reference.split("/")
    return "" not in parts and "." not in parts and ".." not in parts and "\0" not in reference


def _listed(path: Path) -> _Folder:
    state = _state(path)
    folder = _Folder(state)
    if not state:
        return folder
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                folder.names.add(entry.name)
                if entry.is_symlink():
                    folder.links.add(entry.name)
                elif not entry.is_file():
                    folder.folders.add(entry.name)
    except OSError:  # it may be passed through, not listed: then every file is asked for
        return _Folder(state)
    return folder


def _state(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:  # no name that a folder can have, or not to be passed through: asking for its files says which
        return []
    return [status.st_ino, status.st_mtime_ns] if stat.S_ISDIR(status.st_mode) else None


def _kept(name: str, root: Path) -> dict[str, Any] | None:
    """Return a kept result whose folders are as they were; None if there is none."""
    content = store.load(name)
    if content is None:
        return None
    try:
        known = json.loads(content)
        same = all(_state(root / parent) == state for parent, state in known["folders"].items())
        return known if same and isinstance(known["missing"], list) and isinstance(known["links"], list) else None
    except (ValueError, KeyError, TypeError, AttributeError):  # cut short or edited: made anew
        return None


def _keep(name: str, folders: dict[str, _Folder], missing: list[str], links: list[str]) -> None:
    newest = max((folder.state[1] for folder in folders.values() if folder.state), default=0)
    if newest > time.time_ns() - SETTLED:
        return
    states = {parent: folder.state for parent, folder in folders.items()}
    store.keep(name, json.dumps({"folders": states, "missing": missing, "links": links}).encode())
