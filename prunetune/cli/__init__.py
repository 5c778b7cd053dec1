"""The ``prunetune`` command line: reads arguments, calls one function, prints where the results are."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

import click

from prunetune.cli.group import Commands
from prunetune.errors import PrunetuneError
from prunetune.extras import extra_of

INTERRUPTED = "interrupted; run the same command again"
BEGIN = "Begin with `prunetune demo --quick`, or a name from `prunetune configs list`; COMMAND --help has every option."
GO_ON = {"cache", "evaluate", "recalibrate", "table", "teach"}
"""The commands that continue what was interrupted; the others start over, and leave nothing half written."""


@click.group(cls=Commands, invoke_without_command=True, epilog=BEGIN)
@click.version_option(package_name="prunetune")
@click.pass_context
def commands(context: click.Context) -> None:
    """Recalibrate the projector of a vision-language model whose visual tokens are pruned, and compare."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(arguments: list[str] | None = None) -> None:
    """Run a subcommand; errors of the user's making end with their message alone."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.unraisablehook = _interrupt_again
    try:
        commands.main(arguments, prog_name="prunetune", standalone_mode=False)
    except PrunetuneError as error:  # anything else is a bug and shows where it is
        sys.exit(f"error: {error}")
    except click.ClickException as error:
        sys.exit(f"error: {error.format_message()}")
    except ModuleNotFoundError as error:
        if (extra := extra_of(error.name)) is None:
            raise
        sys.exit(f"error: {error.name} is not installed; pip install 'prunetune[{extra}]'")
    except click.Abort:
        click.echo(f"\n{_interrupted(sys.argv[1:] if arguments is None else arguments)}", err=True)
        sys.exit(130)  # what shells report for Ctrl-C


def _interrupted(arguments: list[str]) -> str:
    """Return what the next run of an interrupted command does."""
    if arguments and arguments[0] in GO_ON:
        return f"{INTERRUPTED}: it goes on where this one stopped"
    return f"{INTERRUPTED}: it starts over, and what was complete before is untouched"


def _interrupt_again(lost: Any) -> None:
    """Interrupt once more where Python has no choice but to drop a Ctrl-C: in a finalizer, of a weak reference say."""
    if lost.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(lost)
    elif not sys.is_finalizing():
        # A moment later and from elsewhere: raised in here, it would be dropped as well.
        main_thread = threading.main_thread().ident
        again = threading.Timer(0.1, signal.pthread_kill, (main_thread, signal.SIGINT))
        again.daemon = True
        again.start()
