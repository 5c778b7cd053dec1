"""``prunetune calibrate``."""

import click

from prunetune.cli.options import at_least_one
from prunetune.cli.schema import SchemaCommand, config_option
from prunetune.configs import RecalibrateConfig


def run(config: str, count: int, batch_size: int, overrides: list[str]) -> None:
    """Measure how complex a data sample is: effective rank and attention entropy, into the options of `adaptive`."""
    from prunetune.configs import load_config
    from prunetune.configs.load import config_file
    from prunetune.evaluation.run.calibrate import calibrate, check_writable, write_averages

    settings = load_config(RecalibrateConfig, config, overrides)
    adaptive = settings.pruning.pruner == "adaptive"
    if adaptive:
        check_writable(config_file(config))
    result = calibrate(settings, count, batch_size)
    print(f"{result.items} items of recipe {settings.data.recipe}, pruner {settings.pruning.pruner}\n")
    print(result.to_markdown())
    if not adaptive:
        print("\nnothing written: the averages are options of `adaptive`")
        return
    measured = f"{result.items} items of {settings.data.recipe}, {settings.model.path}"
    written = write_averages(config_file(config), result, measured)
    print(f"\nwritten to {config}: " + ", ".join(f"{name}: {value}" for name, value in written.items()))


command = SchemaCommand(
    "calibrate",
    RecalibrateConfig,
    callback=run,
    params=[
        config_option(required=True),
        click.Option(["--count"], type=int, callback=at_least_one, default=512, help="how many samples"),
        click.Option(["--batch-size"], type=int, callback=at_least_one, default=8, help="samples per step"),
    ],
    help=run.__doc__,
)
