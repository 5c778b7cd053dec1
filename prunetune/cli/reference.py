"""The pages ``docs/reference.md`` and ``docs/options.md``: ``python -m prunetune.cli.reference`` writes both."""

from __future__ import annotations

from pathlib import Path

import click

from prunetune.cli import commands, options_page
from prunetune.cli.options_page import FILES, sections_of
from prunetune.cli.schema import SchemaCommand

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"
HEAD = """# Command line

Generated from the commands by `python -m prunetune.cli.reference`. A command that takes `--config` takes every key of
its configuration as an option as well, `--section.field value`, which wins over the file: they are on the page
[options](options.md), and in the command's `--help`. `eval "$(prunetune completion bash)"` completes commands and
options.
"""


def reference() -> str:
    """Return the page: every command with every option, its type, default and meaning."""
    return "\n".join([HEAD, *_command(commands, "prunetune")]).rstrip() + "\n"


def _command(command: click.Command, path: str) -> list[str]:
    """Return the lines of a command and of its subcommands."""
    context = click.Context(command, info_name=path)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    lines = [f"## `{path}`\n", f"    {usage}\n", (command.help or "").split("\n\n")[0] + "\n"]
    options = [param for param in command.get_params(context) if isinstance(param, click.Option)]
    rows = [_row(option, context) for option in options if not {"--help", "--version"} & set(option.opts)]
    if rows:
        lines += ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [_cells(*row) for row in rows]
        lines.append("")
    if isinstance(command, SchemaCommand):
        lines.append(_keys(command) + "\n")
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            lines += _command(command.commands[name], f"{path} {name}")
    return lines


def _keys(command: SchemaCommand) -> str:
    """Return the sentence that leads to the keys of the command's configuration."""
    (kind,) = [kind for kind, schema in FILES.items() if schema is command.schema]
    sections = ", ".join(f"[`{name}`](options.md#{name})" for name in sections_of(command.schema))
    article = "an" if kind[0] in "aeiou" else "a"
    return f"And the keys of {article} {kind}: {sections}, and [its own](options.md#{kind})."


def _row(option: click.Option, context: click.Context) -> tuple[str, str, str | None, str]:
    """Return flag, type, default and meaning of one of a command's own options."""
    default = option.to_info_dict()["default"]
    shown = None if option.required else ("" if default is None or option.is_flag else str(default))
    kind = "" if option.is_flag else option.make_metavar(context)
    return ", ".join(option.opts), kind, shown, option.help or ""


def _cells(flag: str, kind: str, default: str | None, about: str) -> str:
    cells = [f"`{flag}`", kind, "**required**" if default is None else default, about]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(reference())
    options_page.PAGE.write_text(options_page.options_page())
