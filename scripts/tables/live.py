"""A table while it is filled: what is done of every cell, how fast, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prunetune.scripts.tables.cells import Cell, Plan
from prunetune.scripts.tables.state import items_done
from prunetune.train.plan import duration

REFRESH = 2.0
"""Seconds between two looks at the cells' files, which tell what was answered wherever it is."""


@dataclass
class Progress:
    """What a table's cells have come to.

    Attributes:
        plan: the table's.
        items: questions of each benchmark.
        done: cells that were complete, with their headline value.
        failed: cells that failed, with the reason.
        began: when this run did.
        before: questions that were answered before it.
        counts: answers of each cell, as they were last looked at.
    """

    plan: Plan
    items: Mapping[str, int]
    done: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    before: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def look(self) -> None:
        """Count the answers of all cells that are under way."""
        for cell in self.plan.cells:
            self.counts[cell.name] = self.items[cell.task] if cell.name in self.done else items_done(cell)

    @property
    def answered(self) -> int:
        """Questions that were answered, by this run or before."""
        return sum(count for name, count in self.counts.items() if name not in self.failed)

    @property
    def total(self) -> int:
        """Questions of all cells that have not failed."""
        return sum(self.items[cell.task] for cell in self.plan.cells if cell.name not in self.failed)

    def line(self) -> str:
        """Return how far it is, how fast, and how long the rest will take."""
        took = time.monotonic() - self.began
        rate = (self.answered - self.before) / took if took > 0 else 0
        left = self.total - self.answered
        cells = f"{len(self.done)} of {len(self.plan.cells)} cells"
        if self.failed:
            cells += f", {len(self.failed)} failed"
        eta = f", about {duration(left / rate)} left" if rate > 0 and left > 0 else ""
        return f"{cells}, {self.answered:,} of {self.total:,} answers, {rate:,.1f} a second{eta}"

    def __rich__(self) -> Group:
        self.look()
        tasks = self.plan.config.tasks
        table = Table(title=self.plan.config.title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        table.add_column("arm", no_wrap=True)
        for task in tasks:
            table.add_column(task, justify="right", no_wrap=True)
        cells = {(cell.arm.name, cell.task): cell for cell in self.plan.cells}
        several = len(self.plan.models) > 1
        for arm in self.plan.arms:
            name = arm.name if several else arm.name.partition("/")[2]
            table.add_row(name, *[self._cell(cells[arm.name, task]) for task in tasks])
        bar = ProgressBar(total=max(self.total, 1), completed=self.answered, width=40)
        return Group(table, bar, Text(self.line()))

    def _cell(self, cell: Cell) -> Text:
        if cell.name in self.failed:
            return Text("failed", style="bold red")
        if cell.name in self.done:
            return Text(self.done[cell.name], style="green")
        count = self.counts.get(cell.name, 0)
        return Text(f"{100 * count / max(self.items[cell.task], 1):.0f} %" if count else "·", style="dim")


@contextmanager
def shown(progress: Progress, console: Console) -> Iterator[None]:
    """Show the table while it is filled, on a terminal; elsewhere the lines of its cells are enough."""
    progress.look()
    progress.before = progress.answered
    progress.began = time.monotonic()
    if not console.is_terminal:
        yield
        return
    with Live(progress, console=console, refresh_per_second=1 / REFRESH, vertical_overflow="visible"):
        yield
