"""``prunetune list``."""

import click

from prunetune.cli.options import plugins_option

KINDS = ("families", "formats", "plugins", "pruners", "recipes", "signals", "stages", "tasks", "templates")


@click.command("list")
@click.argument("what", type=click.Choice(KINDS))
@plugins_option
def command(what: str) -> None:
    """What can be named in a configuration."""
    from prunetune.scripts.listing import listed

    print(listed(what))
