"""``prunetune env``."""

import click


@click.command("env")
def command() -> None:
    """Versions, devices, plug-ins and what is missing: the first thing that a bug report needs."""
    from prunetune.scripts.environment import environment

    print(environment())
