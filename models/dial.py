"""``dial.json``: what a projector's losses are at several strengths. Reading it needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunetune.models.code import code_record
from prunetune.models.errors import CheckpointError
from prunetune.models.seal import read_sealed, sealed
from prunetune.outputs import write_text

DIAL = "dial.json"


def write_dial(folder: Path, values: Mapping[str, Any]) -> None:
    """Write a dial's losses with a seal over all of them."""
    content = {"format": 1, **values, "prunetune": code_record()}
    write_text(folder / DIAL, json.dumps(sealed(content), indent=1) + "\n")


def read_dial(folder: Path) -> dict[str, Any]:
    """Return a dial's losses; raises CheckpointError if the file is missing, broken or was edited."""
    return read_sealed(folder / DIAL, "dial", "run prunetune dial again", CheckpointError, format=1)
