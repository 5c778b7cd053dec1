"""``dial.json``: what a projector's losses are at several strengths. Reading it needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunetune.models.code import code_record
from prunetune.models.errors import CheckpointError
from prunetune.models.seal import sealed, why_unsealed
from prunetune.outputs import write_text
from prunetune.reading import read_json

DIAL = "dial.json"


def write_dial(folder: Path, values: Mapping[str, Any]) -> None:
    """Write a dial's losses with a seal over all of them."""
    content = {"format": 1, **values, "prunetune": code_record()}
    write_text(folder / DIAL, json.dumps(sealed(content), indent=1) + "\n")


def read_dial(folder: Path) -> dict[str, Any]:
    """Return a dial's losses; raises CheckpointError if the file is missing, broken or was edited."""
    path = folder / DIAL
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; run prunetune dial again")
    values = read_json(path, CheckpointError)
    if not isinstance(values, dict) or values.get("format") != 1:
        raise CheckpointError(f"{path} is no dial of this version; run prunetune dial again")
    wrong = why_unsealed(values)
    if wrong is not None:
        raise CheckpointError(f"{path} can't be trusted: {wrong}; run prunetune dial again")
    return values
