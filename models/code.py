"""Which prunetune ran: its version, a hash of the source that decides numbers and, in a checkout, the commit."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
"""The folder of our folders: a checkout, or the installed package itself."""
# Reading results and drawing tables decides no number of an arm.
_FOLDERS = ("data_recipes", "evaluation/metrics", "evaluation/run", "evaluation/tasks", "models", "pruning")
_SUFFIXES = (".py", ".jinja", ".yaml")


@cache
def code_record() -> dict[str, Any]:
    """Return what records and manifests say of this package.

    ``version``, ``sha256`` of the source between the data and the scores, and for people ``commit`` and ``dirty``,
    whether files differ from it; the last two are None outside a git checkout, or where git can't tell.
    """
    commit = _git("rev-parse", "HEAD")
    # Without what git does not track: a run's own outputs often lie in the checkout.
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "version": _version(),
        "sha256": source_hash(),
        "commit": commit,
        "dirty": None if commit is None or changed is None else bool(changed),
    }


def source_hash() -> str:
    """Return a SHA-256 of the files that decide an arm's numbers, the same installed and in a checkout."""
    digest = hashlib.sha256()
    for folder in _FOLDERS:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in _SUFFIXES:
                digest.update(file.relative_to(ROOT).as_posix().encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def told(code: dict[str, Any] | None) -> str:
    """Return a record of the code for people, ``0.1.0 (commit 4c8599c, edited)``."""
    if code is None:
        return "an earlier version"
    text = f"{code['version']} (source {code['sha256'][:8]}"
    if code.get("commit"):
        text += f", commit {code['commit'][:8]}{', edited' if code.get('dirty') else ''}"
    return text + ")"


def _version() -> str:
    # The checkout's own, where another version may be installed beside it.
    project = ROOT / "pyproject.toml"
    if project.is_file():
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    return metadata.version("prunetune")


def _git(*arguments: str) -> str | None:
    """Return what git says of the checkout; None outside one, or where git fails."""
    if not (ROOT / ".git").exists():
        return None
    # A hook's or another repository's settings would answer for that one; no lock is taken in the user's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    line = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=20, env=environment, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
