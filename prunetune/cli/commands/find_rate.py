"""``prunetune find-rate``."""

from pathlib import Path

import click

from prunetune.cli.schema import SchemaCommand, config_option
from prunetune.configs import RecalibrateConfig


def run(config: str, lowest: float, highest: float, steps: int, to: str | None, overrides: list[str]) -> None:
    """Suggest a learning rate: raise it step by step over the recipe's own batches until the loss diverges.

    One process trains a copy of the projector; the run's own folder is not touched. Writes `lr_finder.json` and
    `lr_finder.png`; the same seed gives the same numbers.
    """
    from prunetune.configs import ConfigError, load_config
    from prunetune.outputs import RATE, OutputFolder
    from prunetune.screen import libraries_in
    from prunetune.train.find_rate import PLOT, find_rate, lines

    if not 0 < lowest < highest:
        raise ConfigError(f"--lowest is above 0 and below --highest, got {lowest:g} and {highest:g}")
    if steps < 3:
        raise ConfigError(f"--steps is at least 3, since a slope is read from three losses, got {steps}")
    settings = load_config(RecalibrateConfig, config, overrides)
    folder = Path(to) if to is not None else Path(f"{settings.output.rstrip('/')}_rate")
    with OutputFolder(folder, RATE, settings.overwrite, (settings.model.path,)), libraries_in(folder / "libraries.log"):
        found = find_rate(settings, folder, lowest, highest, steps)
    print("\n".join([*lines(found, settings.train.learning_rate), str(folder / PLOT)]))


command = SchemaCommand(
    "find-rate",
    RecalibrateConfig,
    callback=run,
    params=[
        config_option(required=True),
        click.Option(["--lowest"], type=float, default=1e-7, help="the first learning rate"),
        click.Option(["--highest"], type=float, default=1.0, help="the last one, if the loss does not diverge before"),
        click.Option(["--steps"], type=int, default=100, help="updates in all"),
        click.Option(["--to"], metavar="DIR", help="folder of the two files; default is the run's output with `_rate`"),
    ],
    help=run.__doc__,
)
