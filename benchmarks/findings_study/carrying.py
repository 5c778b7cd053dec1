"""What carries over to real models: for each finding the launch line that would test it, with its planned cost."""

from __future__ import annotations

from collections.abc import Iterator

from findings_study.results import Results


def section(results: Results) -> Iterator[str]:
    """Yield the last section."""
    yield "## What carries over to real models"
