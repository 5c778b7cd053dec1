"""What is written of a filled table."""

from __future__ import annotations

from collections.abc import Mapping

from prunetune.outputs import OutputFolder
from prunetune.scripts.tables.cells import Plan
from prunetune.scripts.tables.cost import Questions


def write_table(
    plan: Plan, questions: Mapping[str, Questions], failed: Mapping[str, str], folder: OutputFolder
) -> None:
    """Stub."""
