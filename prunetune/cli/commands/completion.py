"""``prunetune completion``."""

import click
from click.shell_completion import get_completion_class


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print a script that makes SHELL complete commands and options: eval "$(prunetune completion bash)"."""
    completion = get_completion_class(shell)
    assert completion is not None  # the choices are those that click has
    root = context.find_root()
    print(completion(root.command, {}, "prunetune", "_PRUNETUNE_COMPLETE").source())
