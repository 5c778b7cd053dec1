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


def at_least_one(context: click.Context, option: click.Parameter, value: int) -> int:
    """Return a number of things; raises BadParameter for none or fewer."""
    if value < 1:
        raise click.BadParameter(f"{option.opts[0]} is at least 1, got {value}")
    return value


def share(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """Return a share in [0, 1], or None if none was given; raises BadParameter for anything else."""
    if value is not None and not 0 <= value <= 1:
        raise click.BadParameter(f"{option.opts[0]} is a share in [0, 1], got {value}")
    return value
