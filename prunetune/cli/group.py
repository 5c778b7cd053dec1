"""The subcommands: one file each in ``prunetune/cli/commands/``, found by name."""

from __future__ import annotations

import importlib
import pkgutil
import re

import click

SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 120}
"""Of every command: what help looks like."""


class Summarised(click.Group):
    """A group whose help has the first clause of each command's description, whole: click would cut it at the line."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by name."""
        rows = [(name, re.split(r"[:;.]\s", f"{self.commands[name].help} ")[0]) for name in sorted(self.commands)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class Commands(Summarised):
    """A group whose subcommand NAME is the object ``command`` of ``prunetune.cli.commands.NAME``."""

    def __init__(self, **options: object) -> None:
        super().__init__(context_settings=SETTINGS, **options)  # type: ignore[arg-type]
        self._load()

    def _load(self) -> None:
        """Import the files; none of them imports torch, so that help is there at once."""
        package = importlib.import_module("prunetune.cli.commands")
        for module in pkgutil.iter_modules(package.__path__):
            file = importlib.import_module(f"{package.__name__}.{module.name}")
            self.add_command(file.command)
