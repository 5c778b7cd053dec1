"""The pages ``docs/reference.md`` and ``docs/options.md``: ``python -m prunetune.cli.reference`` writes both."""

from __future__ import annotations

from pathlib import Path

import click

from prunetune.cli import commands
from prunetune.cli.schema import SchemaCommand, by_section

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"
HEAD = """# Command line

Generated from the commands and the schema by `python -m prunetune.cli.reference`. Every option of a section can
stand in the YAML file or on the command line, where it wins. `eval "$(prunetune completion bash)"` completes commands
and options.
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
    if isinstance(command, SchemaCommand):
        for _, schema in by_section(command.schema):
            rows += [(option.flag, option.type, option.default, option.about) for option in schema]
    if rows:
        lines += ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [_cells(*row) for row in rows]
        lines.append("")
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            lines += _command(command.commands[name], f"{path} {name}")
    return lines


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
    from prunetune.cli import options_page

    PAGE.write_text(reference())
    options_page.PAGE.write_text(options_page.options_page())
