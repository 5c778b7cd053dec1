"""``prunetune demo``."""

from pathlib import Path

import click

from prunetune.cli.options import overwrite_option


@click.command("demo")
@click.option("--quick", is_flag=True, help="fewer scenes and training samples: at most 2 minutes")
@click.option("--hard", is_flag=True, help="in the harder tiny world, which takes longer")
@click.option("--output", type=Path, default=Path("runs/demo"), help="folder of everything that is written")
@overwrite_option
def command(quick: bool, hard: bool, output: Path, overwrite: bool) -> None:
    """The whole story on the bundled tiny VLM: prune, recalibrate, compare (CPU, minutes)."""
    from prunetune.scripts.demo import run_demo

    run_demo(output, quick, overwrite, hard)
