"""Check that a version is everywhere the same, and print its section of the changelog: ``scripts/release.py 0.1.0``.

It needs nothing but Python's own library: a release workflow runs it before anything is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def versions(root: Path) -> dict[str, str | None]:
    """Return the version that each file says; None where it says none."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = re.search(r"^version: (\S+)$", (root / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    return {"pyproject.toml": project["version"], "CITATION.cff": cited[1] if cited else None}


def notes(changelog: str, version: str) -> str | None:
    """Return what the changelog says of a version, or None if it has no section ``## [version] - date``."""
    section = re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL
    )
    return section[1].strip() if section and section[1].strip() else None


def main(version: str, root: Path = ROOT) -> str:
    """Return the notes of a release, and stop with one line where something is missing."""
    for file, said in versions(root).items():
        if said != version:
            sys.exit(f"error: the tag says {version}, {file} says {said}; make them the same")
    found = notes((root / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    if found is None:
        sys.exit(f"error: CHANGELOG.md has no section '## [{version}] - YYYY-MM-DD'; give Unreleased that name")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("error: give the version, as in scripts/release.py 0.1.0")
    print(main(sys.argv[1]))
