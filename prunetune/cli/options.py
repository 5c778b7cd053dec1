"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

DTYPES = click.Choice(["float32", "bfloat16", "float16"])


def overwrite_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--overwrite``."""
    about = "use an output folder that holds other files; only what prunetune wrote is ever replaced"
    return click.option("--overwrite", is_flag=True, help=about)(function)


def plugins_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--plugins``: each is loaded before the command runs."""
    about = "a module or .py file that registers something, see docs/adding.md; may be repeated"
    option = click.option("--plugins", multiple=True, help=about, callback=_load, expose_value=False, is_eager=True)
    return option(function)


def _load(context: click.Context, option: click.Parameter, names: tuple[str, ...]) -> None:
    from prunetune.plugins import load_plugins

    if not context.resilient_parsing:
        load_plugins(names)
