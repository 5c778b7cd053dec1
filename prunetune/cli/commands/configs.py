"""``prunetune configs list``, ``show`` and ``copy``."""

from pathlib import Path

import click

from prunetune.cli.group import SETTINGS, Summarised


@click.group("configs", cls=Summarised, context_settings=SETTINGS)
def command() -> None:
    """The shipped configurations: list, show or copy them."""


@command.command("list")
def list_them() -> None:
    """Name them, each with its first line."""
    from prunetune.configs.load import shipped_configs
    from prunetune.scripts.listing import table

    rows = [[name, path.read_text().splitlines()[0].lstrip("# ")] for name, path in shipped_configs().items()]
    print(table([["name", "about"], *rows]))


@command.command("show")
@click.argument("name")
def show(name: str) -> None:
    """Print one; `--config NAME` uses it as it is."""
    from prunetune.configs.load import config_file

    click.echo(config_file(name).read_text(), nl=False)


@command.command("copy")
@click.argument("name")
@click.argument("file", type=Path, required=False)
def copy(name: str, file: Path | None) -> None:
    """Copy one to FILE, or into the working directory, to be edited. Nothing is overwritten."""
    from prunetune.configs import ConfigError
    from prunetune.configs.load import config_file

    source = config_file(name)
    target = file or Path(source.name)
    if target.is_dir():
        target = target / source.name
    try:
        with target.open("x") as stream:
            stream.write(source.read_text())
    except FileExistsError:
        raise ConfigError(f"{target} exists already; name another file") from None
    except OSError as error:
        raise ConfigError(f"{target} can't be written: {error.strerror}") from None
    print(target)
