"""Folders as a table names them: never by where they lie on one machine."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

# Two parts at least, and nothing before that would make it a part of a relative path or of an address: "and/or",
# "https://host/page".
_PART = r"[^\s/\\'\"`(),;:<>|]+"
_ABSOLUTE = re.compile(rf"(?<![\w.~:/\\-])(?:[A-Za-z]:)?[/\\]{_PART}(?:[/\\]{_PART})+[/\\]?")


def relative_names(folders: Sequence[Path]) -> list[str]:
    """Return names of folders: their paths below the innermost folder that all of them lie in."""
    if not folders:
        return []
    absolute = [Path(os.path.abspath(folder)) for folder in folders]
    # Of the parents: a folder that lies in another one of them leaves both a name.
    shared = os.path.commonpath([folder.parent for folder in absolute])
    return [os.path.relpath(folder, shared) for folder in absolute]


def without_folders(text: str, output: Path | None = None) -> str:
    """Return text with each absolute path as seen from ``output`` if it lies there, and as its last part otherwise."""
    if output is not None:
        for own in {str(output), os.path.abspath(output), str(output.resolve())}:
            # Before the pattern, which ends a path at a blank.
            if os.path.isabs(own):
                text = re.sub(rf"(?<![\w.~:/\\-]){re.escape(own)}[/\\]", "", text)
    return _ABSOLUTE.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)
