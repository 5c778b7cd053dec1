"""The index of a feature cache, ``features.json``: what it is made of and with, under a seal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunetune.models.errors import FeatureError
from prunetune.models.seal import read_sealed, seal_of, sealed
from prunetune.outputs import write_text

INDEX = "features.json"
KIND = "prunetune features"
FORMAT = 1
# What a cache that is gone on with need not share with its beginning: how far it is, and what is there for people.
_BESIDE = ("kind", "format", "complete", "shards", "by_projector", "seal", "prunetune", "plugins")


def settings_of(index: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the bytes of the shards."""
    return {name: value for name, value in index.items() if name not in _BESIDE}


def made_with(index: dict[str, Any]) -> str:
    """Return the seal of what decides the bytes of the shards, which each of them holds."""
    return seal_of(settings_of(index))


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write the index with its seal."""
    write_text(folder / INDEX, json.dumps(sealed({"kind": KIND, "format": FORMAT, **index}), indent=1) + "\n")


def read_index(folder: Path) -> dict[str, Any]:
    """Return the index of a feature cache.

    Raises:
        FeatureError: if there is none, or it was changed.
    """
    path = folder / INDEX
    if not path.is_file():
        raise FeatureError(f"{folder} holds no feature cache: there is no {INDEX}; `prunetune cache` makes one")
    return read_sealed(path, "index of a feature cache", "make the cache anew", FeatureError, kind=KIND, format=FORMAT)
