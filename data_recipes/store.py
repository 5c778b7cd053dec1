"""Small results of reading data, kept beside the Arrow cache of ``datasets``; they may be deleted at any time."""

from __future__ import annotations

from pathlib import Path

from prunetune.outputs import OutputError, write_bytes


def stored_file(name: str) -> Path:
    """Return where a result of this name is kept."""
    from datasets import config  # takes a second, and naming recipes does not need it

    return Path(config.HF_DATASETS_CACHE) / "prunetune" / name


def load(name: str) -> bytes | None:
    """Return what was kept under a name; None if nothing was, or it can't be read."""
    try:
        return stored_file(name).read_bytes()
    except OSError:
        return None


def keep(name: str, content: bytes) -> None:
    """Keep a result, whole or not at all: ranks may do it at once. A cache that can't be written costs time alone."""
    file = stored_file(name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, content)
    except (OSError, OutputError):
        return
