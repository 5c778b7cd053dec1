"""Finished trainings and scores, one JSON line each, and the weights that were trained."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, dict[str, Tensor]]


class Store:
    """Rows by the hash of everything they depend on; a row that is there is never made again.

    Args:
        rows: folder of one file of lines a group; it is small and belongs to the repository.
        weights: folder of trained projectors, which can be made anew from the rows' settings.
    """

    def __init__(self, rows: Path, weights: Path) -> None:
        self.folder, self.weights_folder = rows, weights
        self.rows: dict[str, dict[str, Any]] = {}
        for path in sorted(rows.glob("*.jsonl")):
            for row in _lines(path):
                self.rows[row["key"]] = row

    def add(self, group: str, row: dict[str, Any]) -> None:
        """Append a row to its group's file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{group}.jsonl"
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            # A line that a killed run left half written stays one line of its own, which is skipped when rows are read.
            file.write(("\n" if torn and path.stat().st_size else "") + json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[row["key"]] = row

    def weights(self, key: str) -> Weights | None:
        """Return what a training ended with, or None if it is not there."""
        path = self.weights_folder / f"{key}.pt"
        if not path.exists():
            return None
        found: Weights = torch.load(path, weights_only=True)
        return found

    def add_weights(self, key: str, weights: Weights) -> None:
        """Keep what a training ended with."""
        self.weights_folder.mkdir(parents=True, exist_ok=True)
        part = self.weights_folder / f".{key}.{os.getpid()}"
        torch.save(weights, part)
        os.replace(part, self.weights_folder / f"{key}.pt")


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # half a line of a run that was killed while it wrote
            continue
    return found
