"""``prunetune calibrate``."""

from pathlib import Path

import click

from prunetune.cli.schema import SchemaCommand, config_option
from prunetune.configs import RecalibrateConfig


def run(config: str, count: int, batch_size: int, overrides: list[str]) -> None:
    """Measure how complex a data sample is: effective rank and attention entropy, into the options of `adaptive`."""
    from prunetune.configs import ConfigError, load_config
    from prunetune.evaluation.run.calibrate import calibrate, write_averages

    settings = load_config(RecalibrateConfig, config, overrides)
    if settings.pruning.pruner == "adaptive" and not Path(config).is_file():
        raise ConfigError(
            f"{config} is shipped, and the averages are written into the file; `prunetune configs copy {config}` makes "
            "one of your own"
        )
    result = calibrate(settings, count, batch_size)
    print(f"{result.items} items of recipe {settings.data.recipe}, pruner {settings.pruning.pruner}\n")
    print(result.to_markdown())
    if settings.pruning.pruner == "adaptive":
        written = write_averages(Path(config), result)
        print(f"\nwritten to {config}: " + ", ".join(f"{name}: {value}" for name, value in written.items()))
    else:
        print("\nnothing written: the averages are options of `adaptive`")


command = SchemaCommand(
    "calibrate",
    RecalibrateConfig,
    callback=run,
    params=[
        config_option(required=True),
        click.Option(["--count"], type=int, default=512, help="how many samples"),
        click.Option(["--batch-size"], type=int, default=8, help="samples per step"),
    ],
    help=run.__doc__,
)
