"""The layouts of a table as files of one folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.report.tables.layouts.csv import to_csv
from prunetune.evaluation.report.tables.layouts.json import to_json
from prunetune.evaluation.report.tables.layouts.latex import to_latex
from prunetune.evaluation.report.tables.layouts.markdown import to_markdown
from prunetune.evaluation.report.tables.table import Table
from prunetune.outputs import write_text

LAYOUTS: Mapping[str, tuple[str, Callable[[Table, Sequence[str]], str]]] = {
    "markdown": ("table.md", to_markdown),
    "csv": ("table.csv", lambda table, also: to_csv(table)),  # these two hold every column anyway
    "latex": ("table.tex", to_latex),
    "json": ("table.json", lambda table, also: to_json(table)),
}
"""File name and writer by the layout's name."""


def write_layouts(
    table: Table, folder: Path, layouts: Sequence[str] = tuple(LAYOUTS), also: Sequence[str] = ()
) -> list[Path]:
    """Write a table in some layouts, each whole or not at all, and return the files.

    Args:
        table: what is written.
        folder: of the files, there already.
        layouts: names of LAYOUTS.
        also: further columns of Markdown and LaTeX, see :func:`~prunetune.evaluation.report.tables.layouts.grid.grid`.

    Raises:
        OutputError: if a file can't be written.
        TaskError: for a name that is no layout, or no column; nothing is written then.
    """
    for name in layouts:
        if name not in LAYOUTS:
            raise TaskError(f"{name!r} is no layout of a table; choose among {', '.join(LAYOUTS)}")
    texts = {}
    for name in layouts:
        file, draw = LAYOUTS[name]
        texts[folder / file] = draw(table, also)
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)
