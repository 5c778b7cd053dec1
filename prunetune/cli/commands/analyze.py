"""``prunetune analyze``."""

import click

from prunetune.cli.schema import SchemaCommand, config_option
from prunetune.configs import AnalyzeConfig


def run(config: str | None, runs: tuple[str, ...], overrides: list[str]) -> None:
    """What methods keep of images and why: tables as CSV, figures, and a page that shows them.

    Effective rank and attention entropy of images, diversity of what is kept, how much of the attention, where it lies,
    how far methods agree, what corrupted images change; and from finished evaluations on POPE and CHAIR, which objects
    are invented. Images are encoded once for all methods.
    """
    from pathlib import Path

    from prunetune.configs import load_config
    from prunetune.evaluation.analysis.analyze import analyze
    from prunetune.outputs import ANALYSIS, OutputFolder
    from prunetune.screen import libraries_in

    named = ["--runs", "[" + ", ".join(map(_quoted, runs)) + "]"] if runs else []
    settings = load_config(AnalyzeConfig, config, [*named, *overrides])
    folder = OutputFolder(settings.output, ANALYSIS, settings.overwrite, reads=settings.runs)
    with folder, libraries_in(Path(settings.output) / "libraries.log"):
        print(f"analysis: {analyze(settings)}")


def _quoted(text: str) -> str:
    """Return a text as YAML reads it, whatever it is made of."""
    return "'" + text.replace("'", "''") + "'"


command = SchemaCommand(
    "analyze",
    AnalyzeConfig,
    callback=run,
    params=[
        config_option(),
        click.Option(["--runs"], multiple=True, metavar="FOLDER", help="a finished evaluation; may be repeated"),
    ],
    help=run.__doc__,
)
