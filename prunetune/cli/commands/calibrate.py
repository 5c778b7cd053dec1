"""``prunetune calibrate``."""

from pathlib import Path

import click

from prunetune.cli.options import at_least_one
from prunetune.cli.schema import SchemaCommand, config_option
from prunetune.configs import RecalibrateConfig


def run(config: str, profile: str | None, count: int, batch_size: int, eta: float, overrides: list[str]) -> None:
    """Fit a method to a model on a recipe's or a benchmark's samples, and write a profile for `pruning.profile`.

    A configuration of a recalibration is measured on its recipe, by the likelihood of the answers; one of an
    evaluation on its one task, by the task's score, and may then have the keys of `prunetune evaluate`. Of the stage
    vtw the layer is fitted at which all visual tokens leave. No other file than the profile is written.
    """
    from prunetune.configs import EvaluateConfig, load_config
    from prunetune.configs.load import sets
    from prunetune.evaluation.run.calibrate import calibrate
    from prunetune.models.profile import check_target, write_profile

    settings: RecalibrateConfig | EvaluateConfig
    if sets(config, "tasks", overrides):
        settings = load_config(EvaluateConfig, config, overrides)
        measured_on = ", ".join(settings.tasks)
    else:
        settings = load_config(RecalibrateConfig, config, overrides)
        measured_on = f"recipe {settings.data.recipe}"
    if profile is not None:
        check_target(Path(profile), settings.overwrite)
    pruner = settings.pruning.pruner
    result = calibrate(settings, count, batch_size, eta=eta)
    print(f"{result.items} items of {measured_on}, pruner {pruner}\n")
    print(result.to_markdown())
    if result.profile is None:
        print(f"\nnothing written: {pruner} has nothing to fit")
        return
    for option in result.profile.options:
        if option in settings.pruning.options:
            print(f"\n{config} sets {option} itself, which wins over a profile; take it out to use what was fitted")
    if profile is None:
        print("\nnothing written: name a file with --profile")
        return
    write_profile(Path(profile), result.profile, settings.overwrite)
    values = {**result.profile.options, **{f"{name} at": value for name, value in result.profile.stages.items()}}
    fitted = ", ".join(f"{name} {value}" for name, value in values.items())
    print(f"\nwritten to {profile}: {fitted}; use it with --pruning.profile {profile}")


command = SchemaCommand(
    "calibrate",
    RecalibrateConfig,
    callback=run,
    params=[
        config_option(required=True),
        click.Option(["--profile"], metavar="FILE", help="where the profile is written; none is written without it"),
        click.Option(["--count"], type=int, callback=at_least_one, default=512, help="how many samples"),
        click.Option(["--batch-size"], type=int, callback=at_least_one, default=8, help="samples per step"),
        click.Option(
            ["--eta"],
            type=float,
            default=0.003,
            help="of vtw: the largest change of the first answer token's distribution (KL) that a layer may make",
        ),
    ],
    help=run.__doc__,
)
