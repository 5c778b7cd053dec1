"""The files of a folder by their relative names, and the patterns that say whose they are."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

_OURS = ".prunetune"
STAGED, MOVED = f"{_OURS}-new-", f"{_OURS}-old-"


def make_folder(path: Path) -> list[Path]:
    """Make a folder and those above it; return those that there were not, the innermost first."""
    made = [part for part in (path, *path.parents) if not part.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return made


def files_of(folder: Path) -> list[str]:
    """Return all files and links below a folder, as relative paths; linked folders are links."""
    found = []
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in [*names, *links]:
            found.append(Path(root, name).relative_to(folder).as_posix())
    return sorted(found)


def is_something(path: Path) -> bool:
    """Return whether an entry of a folder is a file, or holds one; our own marks are none."""
    if path.name.startswith(_OURS):
        return False
    if path.is_symlink() or not path.is_dir():
        return True
    return any(is_something(entry) for entry in path.iterdir())


def matches(file: str, patterns: Collection[str]) -> bool:
    """Return whether a relative name fits one of the patterns, see :class:`~prunetune.outputs.kinds.Kind`."""
    return any(_pattern(pattern).fullmatch(file) for pattern in patterns)


def _pattern(text: str) -> re.Pattern[str]:
    wild = {"**": ".*", "*": "[^/]*", "#": "[0-9]+"}
    parts = [wild.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*|#)", text)]
    return re.compile("".join(parts))


def remove_empty(top: Path, folder: Path) -> None:
    """Remove a folder below ``top`` and those above it, as far as they are empty."""
    while folder != top:
        try:
            folder.rmdir()
        except OSError:  # something is in it
            return
        folder = folder.parent
