"""Which extra brings a package that is not installed."""

from __future__ import annotations

import re
from importlib import metadata

_REQUIRED = re.compile(r"""^([\w.-]+).*\bextra == ["']([\w-]+)["']""")


def extra_of(module: str | None) -> str | None:
    """Return the extra of this package that asks for the distribution of a module, None if none does.

    The distributions in question are called as their modules are.
    """
    if module is None:
        return None
    wanted = _plain(module.split(".")[0])
    return next((extra for name, extra in _asked() if _plain(name) == wanted and extra != "dev"), None)


def absent(extra: str) -> list[str]:
    """Return the distributions of an extra that are not installed."""
    return [name for name, own in _asked() if own == extra and name != "prunetune" and not _is_there(name)]


def _asked() -> list[tuple[str, str]]:
    """Return each distribution that an extra asks for, with the extra."""
    try:
        required = metadata.requires("prunetune") or []
    except metadata.PackageNotFoundError:  # a checkout that was never installed
        return []
    return [(found[1], found[2]) for line in required if (found := _REQUIRED.match(line))]


def _is_there(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
