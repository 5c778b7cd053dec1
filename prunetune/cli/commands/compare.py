"""``prunetune compare``."""

from pathlib import Path

import click

from prunetune.cli.options import overwrite_option, plugins_option


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, type=Path)
@click.option("--output", type=Path, default=Path("runs/compare"), help="folder of the table and the plot")
@click.option(
    "--wandb", type=click.Choice(["off", "auto", "offline", "online"]), default="off", help="send them to W&B"
)
@click.option("--difficulty-filter", type=Path, metavar="RUN", help="only what this downsample arm gets wrong")
@click.option("--quoted", type=Path, metavar="FILE", help="YAML list of rows from papers, shown and marked as quoted")
@overwrite_option
@plugins_option
def command(
    runs: tuple[Path, ...],
    output: Path,
    wandb: str,
    difficulty_filter: Path | None,
    quoted: Path | None,
    overwrite: bool,
) -> None:
    """One table of dense, training-free and tuned arms: RUNS are folders written by prunetune evaluate."""
    from prunetune.configs import TrackingConfig
    from prunetune.evaluation.report.quoted import read_quoted
    from prunetune.evaluation.report.table import to_markdown
    from prunetune.scripts.tracked import tracked_compare

    rows_of_papers = read_quoted(quoted) if quoted else []
    tracking = TrackingConfig.model_validate({"wandb": wandb})
    rows = tracked_compare(list(runs), output, tracking, difficulty_filter, rows_of_papers, overwrite)
    print(to_markdown(rows, rows_of_papers))
    print(f"table.md, table.csv, plot.png: {output}")
