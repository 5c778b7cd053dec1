"""What an analysis leaves behind: tables as CSV, figures with a sentence each, and the page that shows them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from prunetune.evaluation.analysis.images import Dataset
from prunetune.evaluation.analysis.look import Looked

INDEX = "index.md"


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        name: of its files, ``NAME.png`` and ``NAME.svg``.
        title: above it.
        sentence: what it shows, and how that was measured.
    """

    name: str
    title: str
    sentence: str


@dataclass(frozen=True)
class Part:
    """What one analysis found.

    Attributes:
        title: its heading.
        figures: in their order.
        tables: the CSV files with what each holds.
        remarks: sentences before the figures: numbers, or why something is missing.
    """

    title: str
    figures: list[Figure] = field(default_factory=list)
    tables: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


class ImageAnalysis(Protocol):
    """Measures every image and, at the end, writes tables and figures."""

    def add(self, dataset: Dataset, image: str, looked: Looked) -> None:
        """Take in an image."""
        ...

    def write(self, folder: Path) -> Part:
        """Write tables and figures into a folder."""
        ...


class Table:
    """A CSV file that grows row by row, so that nothing of a long run is held.

    Args:
        path: of the file.
        columns: their names.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.columns = list(columns)
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(self.columns)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row; what is missing or None is an empty cell."""
        assert set(row) <= set(self.columns), sorted(set(row) - set(self.columns))
        self._writer.writerow([_cell(row.get(name)) for name in self.columns])

    def close(self) -> None:
        """End the file."""
        self._file.close()


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file."""
    table = Table(path, columns)
    try:
        for row in rows:
            table.add(row)
    finally:
        table.close()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    return "" if value is None else value


def page(title: str, about: Sequence[str], parts: Sequence[Part]) -> str:
    """Return the page: every figure with its sentence, every table with what it holds."""
    lines = [f"# {title}", "", *about, ""]
    for part in parts:
        lines += [f"## {part.title}", ""]
        lines += [f"- {remark}" for remark in part.remarks]
        lines += [""] if part.remarks else []
        for figure in part.figures:
            lines += [f"![{figure.title}]({figure.name}.png)", "", f"**{figure.title}.** {figure.sentence}", ""]
        for name, holds in part.tables.items():
            lines += [f"- [{name}]({name}): {holds}"]
        lines += [""] if part.tables else []
    return "\n".join(lines).rstrip() + "\n"
