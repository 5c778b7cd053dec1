"""Packages whose names are imported when they are first used, so that what needs no torch never waits for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def importer(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's ``__getattr__``.

    Args:
        package: its full name.
        homes: for each public name the module it lives in: below the package, or a full name that begins with
            ``prunetune.``.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        module = home if home.startswith("prunetune.") else f"{package}.{home}"
        return getattr(importlib.import_module(module), name)

    return load
