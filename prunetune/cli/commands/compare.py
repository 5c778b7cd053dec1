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
@click.option(
    "--difficulty-filter", type=Path, metavar="RUN", help="a downsample arm: what it gets wrong has columns of its own"
)
@click.option(
    "--quoted",
    multiple=True,
    metavar="FILE|PAPER",
    help="rows from papers, shown and marked as quoted: a YAML list or a CSV file, or vispruner, prismprune, "
    "crisprune, trimtokenator, adaptive",
)
@click.option(
    "--allow",
    multiple=True,
    metavar="FIELD",
    help="what may differ between arms, commas apart: device, versions.torch, ...; how it does stands in a footnote",
)
@click.option("--rescore", is_flag=True, help="score the saved predictions anew where scorers changed since")
@overwrite_option
@plugins_option
def command(
    runs: tuple[Path, ...],
    output: Path,
    wandb: str,
    difficulty_filter: Path | None,
    quoted: tuple[str, ...],
    allow: tuple[str, ...],
    rescore: bool,
    overwrite: bool,
) -> None:
    """One table of dense, training-free and tuned arms: RUNS are folders written by prunetune evaluate."""
    from prunetune.configs import TrackingConfig
    from prunetune.evaluation.report.quoted import read_all
    from prunetune.evaluation.report.tables.layouts.markdown import to_markdown
    from prunetune.scripts.tracked import tracked_compare

    rows_of_papers = read_all(quoted)
    tracking = TrackingConfig.model_validate({"wandb": wandb})
    table = tracked_compare(
        list(runs), output, tracking, difficulty_filter, rows_of_papers, overwrite, allow=allow, rescore=rescore
    )
    print(to_markdown(table))
    print(f"table.md, table.csv, table.tex, table.json, plot.png: {output}")
