"""``prunetune analyze``."""

from __future__ import annotations

from collections.abc import Sequence

from prunetune.cli.schema import SchemaCommand, config_option
from prunetune.configs import AnalyzeConfig


def run(config: str | None, overrides: list[str]) -> None:
    """What methods keep of images and why: tables as CSV, figures, and a page that shows them.

    Effective rank and attention entropy of images, diversity of what is kept, how much of the attention, where it lies,
    how far methods agree, what corrupted images change. Images are encoded once for all methods. `--runs FOLDER ...`
    reads finished evaluations on POPE and CHAIR instead, or besides: which objects are invented.
    """
    from pathlib import Path

    from prunetune.configs import load_config
    from prunetune.evaluation.analysis.analyze import analyze
    from prunetune.outputs import ANALYSIS, OutputFolder
    from prunetune.screen import libraries_in

    settings = load_config(AnalyzeConfig, config, runs_as_list(overrides))
    folder = OutputFolder(settings.output, ANALYSIS, settings.overwrite, reads=settings.runs)
    with folder, libraries_in(Path(settings.output) / "libraries.log"):
        print(f"analysis: {analyze(settings)}")


def runs_as_list(arguments: Sequence[str]) -> list[str]:
    """Return arguments whose ``--runs A B`` is ``--runs ['A', 'B']``, as other lists are written."""
    found: list[str] = []
    runs: list[str] = []
    inside = False
    for argument in arguments:
        if argument.startswith("--"):
            inside = argument == "--runs"
            if not inside:
                found.append(argument)
        elif inside and not argument.startswith("["):
            runs.append(argument)
        elif inside:  # a list already
            found += ["--runs", argument]
        else:
            found.append(argument)
    if not runs:
        return found
    quoted = ["'" + run.replace("'", "''") + "'" for run in runs]  # as YAML reads any text
    return ["--runs", f"[{', '.join(quoted)}]", *found]


command = SchemaCommand("analyze", AnalyzeConfig, callback=run, params=[config_option()], help=run.__doc__)
