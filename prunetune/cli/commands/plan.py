"""``prunetune plan``."""

from pathlib import Path

import click

from prunetune.cli.options import at_least_one, share
from prunetune.cli.schema import SchemaCommand, config_option
from prunetune.configs import RecalibrateConfig


def run(config: str, gpu: str, gpus: int, mfu: float, write: str | None, overrides: list[str]) -> None:
    """Say what a recalibration will cost before it is started: tokens after pruning, FLOP, memory, time.

    Of the model its config.json is enough: no weight is fetched or read. Where the data is not here, sources of
    LLaVA-1.5's mix are planned on assumptions, which are named. --write puts all of it into a JSON file as well.
    """
    from prunetune.configs import ConfigError, load_config
    from prunetune.outputs import write_text
    from prunetune.train.gpus import gpu_named
    from prunetune.train.plan import make_plan

    settings = load_config(RecalibrateConfig, config, overrides)
    if not mfu:
        raise click.BadParameter("--mfu is a share above 0")
    if write is not None and Path(write).exists():
        raise ConfigError(f"--write {write} is there already; a plan is never written over anything, name another file")
    plan = make_plan(settings, gpu_named(gpu), gpus, mfu)
    print(plan.to_text())
    if write is not None:
        write_text(Path(write), plan.to_json())
        print(f"\nwritten to {write}")


command = SchemaCommand(
    "plan",
    RecalibrateConfig,
    callback=run,
    params=[
        config_option(required=True),
        click.Option(["--gpu"], default="h200", help="b200, h200, h100, a100-80, a100-40, l40s, a6000, rtx4090 or l4"),
        click.Option(["--gpus"], type=int, callback=at_least_one, default=8, help="how many"),
        click.Option(["--mfu"], type=float, callback=share, default=0.45, help="assumed share of their peak"),
        click.Option(["--write"], metavar="FILE", help="where the plan is written as JSON, a new file"),
    ],
    help=run.__doc__,
)
