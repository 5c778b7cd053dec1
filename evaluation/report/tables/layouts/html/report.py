"""Writes the page: the template filled in, style and scripts within it, and a policy that lets nothing else in."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from prunetune.evaluation.report.pages import content_policy, in_script
from prunetune.evaluation.report.tables.layouts.examples import Examples
from prunetune.evaluation.report.tables.layouts.grid import further, grid
from prunetune.evaluation.report.tables.layouts.html.page_data import page_data
from prunetune.evaluation.report.tables.layouts.html.series import SHAPES, series_of
from prunetune.evaluation.report.tables.table import Table
from prunetune.outputs import write_text

_HERE = Path(__file__).parent
_GROUPS = {"gain": "and gains", "kind": "and kinds of questions", "value": "and further metrics", "cost": "and costs"}
"""What may be shown beside the usual columns, by what a heading is of."""
_SCRIPTS = ("page.js", "sorting.js", "chart.js", "pictures.js", "flips.js", "budgets.js")


def write_report(table: Table, examples: Examples | None, path: Path) -> None:
    """Write one HTML page that works from a disk, without a network.

    Args:
        table: what it shows.
        examples: questions with answers and kept tokens, of arms that are in the table; None leaves their parts out.
        path: of the file.

    Raises:
        OutputError: if it can't be written.
    """
    write_text(path, to_html(table, examples))


def to_html(table: Table, examples: Examples | None = None) -> str:
    """Return the page as text, see :func:`write_report`."""
    drawn = grid(table, further(table), mark="asterisk")
    series = series_of(table)
    examples = _of_rows(examples, table)
    style = (_HERE / "report.css").read_text(encoding="utf-8")
    script = "".join((_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    # Text from models and files is escaped by the template, and put on the page as text by the scripts.
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(
        table=table,
        grid=drawn,
        usual=_usual(table),
        groups=_GROUPS,
        shapes=SHAPES,
        series=series,
        examples=examples,
        facts=_facts(table),
        policy=content_policy(style, script),
        style=style,
        script=script,
        data=in_script(page_data(table, drawn, series, examples)),
    )


def _usual(table: Table) -> set[str]:
    """Return the keys of the columns that are shown before anybody asks for more."""
    return {heading.key for heading in grid(table).headings}


def _of_rows(examples: Examples | None, table: Table) -> Examples | None:
    """Return the examples with the arms that are in the table; None if nothing is left."""
    ids = {row.id for row in table.rows}
    found = []
    for example in () if examples is None else examples.examples:
        arms = {name: answered for name, answered in example.arms.items() if name in ids}
        if arms:
            found.append(example.model_copy(update={"arms": arms}))
    return Examples(how=examples.how, examples=found) if examples is not None and found else None


def _facts(table: Table) -> list[str]:
    return list(dict.fromkeys(name for row in table.rows for name in row.facts))
