"""``prunetune table``."""

import sys

import click

from prunetune.cli.options import at_least_one
from prunetune.cli.schema import SchemaCommand, config_option
from prunetune.configs import TableConfig


def run(config: str, dry_run: bool, gpu: str | None, gpus: int, overrides: list[str]) -> None:
    """The table that papers print, from one YAML: train what is missing, evaluate, compare; it goes on where it was.

    Everything that can't work is told before anything starts, and what the rest will cost. An arm that fails does not
    stop the others.
    """
    from prunetune.configs import load_config
    from prunetune.scripts.tables.make import make_table
    from prunetune.train.gpus import gpu_named

    settings = load_config(TableConfig, config, overrides)
    ended = make_table(settings, dry_run, None if gpu is None else gpu_named(gpu), gpus)
    if ended.status:
        sys.exit(ended.status)
    if ended.failed:
        sys.exit(f"error: {len(ended.failed)} cells failed, see above; the same command tries them again")


command = SchemaCommand(
    "table",
    TableConfig,
    callback=run,
    params=[
        config_option(required=True),
        click.Option(["--dry-run"], is_flag=True, help="say what there is to do and what it will cost, and stop"),
        click.Option(["--gpu"], help="plan times for: b200, h200, h100, a100-80, a100-40, l40s, a6000, rtx4090 or l4"),
        click.Option(["--gpus"], type=int, callback=at_least_one, default=1, help="how many"),
    ],
    help=run.__doc__,
)
