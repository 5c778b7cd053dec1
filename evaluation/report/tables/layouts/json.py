"""A table as JSON: all that it holds, to the last bit of every number."""

from __future__ import annotations

from prunetune.evaluation.report.tables.table import Table


def to_json(table: Table) -> str:
    """Return the table as JSON; ``Table.model_validate_json`` gives back an equal one."""
    return table.model_dump_json(indent=2) + "\n"
