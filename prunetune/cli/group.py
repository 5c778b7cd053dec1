"""The subcommands: one file each in ``prunetune/cli/commands/``, found by name."""

from __future__ import annotations

import importlib
import pkgutil

import click

SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 120}
"""Of every command: what help looks like."""


class Commands(click.Group):
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
