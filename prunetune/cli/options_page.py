"""The page of all configuration keys, ``docs/options.md``: ``python -m prunetune.cli.reference`` writes it as well."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from prunetune.cli import commands
from prunetune.cli.schema import SchemaCommand, SchemaOption, schema_options
from prunetune.configs import (
    AnalyzeConfig,
    AnalyzedMethod,
    EvaluateConfig,
    RecalibrateConfig,
    ServeConfig,
    ShownMethod,
    TableConfig,
    TableMethod,
    TableModel,
    VisualizeConfig,
)
from prunetune.configs.schema import MixedPruner
from prunetune.data_recipes.formats import LlavaJsonRecipe
from prunetune.pruning import StageSpec

PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"
FILES: dict[str, type[BaseModel]] = {
    "recalibration": RecalibrateConfig,
    "evaluation": EvaluateConfig,
    "table": TableConfig,
    "analysis": AnalyzeConfig,
    "visualization": VisualizeConfig,
    "serving": ServeConfig,
}
"""The kinds of configuration files there are."""

PARTS: dict[str, tuple[str, type[BaseModel]]] = {
    "elastic.pruners": ("an entry of `elastic.pruners`", MixedPruner),
    "pruning.stages": ("an entry of `pruning.stages`", StageSpec),
    "models": ("an entry of a table's `models`", TableModel),
    "methods": ("an entry of a table's `methods`, or a pruner's name alone", TableMethod),
    "methods of an analysis": ("an entry of an analysis's `methods`, or a pruner's name alone", AnalyzedMethod),
    "methods of a visualization": ("an entry of its `methods`, or a pruner's name alone", ShownMethod),
}
"""Lists of mappings, whose keys no command line option has."""

HEAD = """# Options

Generated from the schema by `python -m prunetune.cli.reference`. These are the keys of configuration files, section by
section. A key `section.field` stands in the YAML file as `section: {field: value}`, or on the command line as
`--section.field value`, which wins. Keys are strict: one that is not here stops before anything is loaded, with the
nearest name that is. Values are YAML on the command line, too (`--tasks '[gqa, pope]'`), and of a mapping single keys
can be set (`--pruning.options.power 2`). What commands take beside a configuration: [command line](reference.md).
Files to begin with: `prunetune configs list`.
"""


def options_page() -> str:
    """Return the page: every key of every kind of configuration file, with its type, default and meaning."""
    lines = [HEAD, "## Who takes what", "", "| file | commands | begins with |", "| --- | --- | --- |"]
    for kind, schema in FILES.items():
        taking = ", ".join(f"`{name}`" for name in sorted(_taking(schema)))
        shown = ", ".join(f"[`{name}`](#{name})" for name in sections_of(schema))
        lines.append(f"| {kind} | {taking} | {shown}, and [its own keys](#{kind}) |")
    for section in dict.fromkeys(name for schema in FILES.values() for name in sections_of(schema)):
        lines += ["", f"## {section}", "", *_about(section), *_table(_options_of(section))]
    for name, (about, schema) in PARTS.items():
        lines += ["", f"## {name}", "", f"{about[0].upper()}{about[1:]}:", "", *_table(schema_options(schema, "--"))]
    for kind, schema in FILES.items():
        lines += ["", f"## {kind}", "", f"{_sentence(schema)} Beside its sections:", "", *_table(_bare(schema))]
    lines += [
        "",
        "## recipe",
        "",
        "A [recipe](data.md) is a YAML file of its own. Of `format: llava_json`, the default:",
        "",
    ]
    lines += _table(schema_options(LlavaJsonRecipe, "--"))
    return "\n".join(lines) + "\n"


def _taking(schema: type[BaseModel]) -> list[str]:
    """Return the commands that read this kind of file."""
    return [
        name
        for name, command in commands.commands.items()
        if isinstance(command, SchemaCommand) and command.schema is schema
    ]


def sections_of(schema: type[BaseModel]) -> list[str]:
    """Return the names of a schema's sections, in its order."""
    return list(dict.fromkeys(option.section for option in schema_options(schema) if option.section))


def _bare(schema: type[BaseModel]) -> list[SchemaOption]:
    return [option for option in schema_options(schema) if not option.section]


def _about(section: str) -> list[str]:
    """Return what the section is, and which files have it."""
    having = [kind for kind, schema in FILES.items() if section in sections_of(schema)]
    inner = FILES[having[0]].model_fields[section].annotation
    return [f"{_sentence(inner if isinstance(inner, type) else None)} In files of: {', '.join(having)}.", ""]


def _sentence(schema: type[BaseModel] | None) -> str:
    return (schema.__doc__ or "").split("\n\n")[0].replace("\n", " ").strip() if schema else ""


def _options_of(section: str) -> list[SchemaOption]:
    """Return a section's options; its fields and defaults are the same wherever it stands."""
    for schema in FILES.values():
        found = [option for option in schema_options(schema) if option.section == section]
        if found:
            return found
    return []


def _table(options: list[SchemaOption]) -> list[str]:
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for option in options:
        default = "**required**" if option.default is None else option.default
        cells = [f"`{option.flag.removeprefix('--')}`", option.type, default, option.about]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return lines
