"""``prunetune cache``."""

import click

from prunetune.cli.schema import SchemaCommand, config_option
from prunetune.configs import RecalibrateConfig
from prunetune.screen import libraries_in


def run(
    config: str,
    also_pruner: tuple[str, ...],
    also_keep: tuple[str, ...],
    also_config: tuple[str, ...],
    all_tokens: bool,
    batch_size: int,
    overrides: list[str],
) -> None:
    """Run tower and pruners once over all images, into the folder that `features` names; an interrupted run goes on.

    What is stored of an image are the features that enter the projector, of the tokens that any of the pruners at any
    of the budgets keeps, and which of them each keeps. `prunetune recalibrate` and `prunetune evaluate` with the same
    `features` then read no pixel and run no tower. A configuration of an evaluation is cached on its tasks' images.
    Of a recalibration over many budgets every setting that it draws is stored; all tokens are where it trains without
    pruning, has a teacher, or a method chooses by the projector's output, which then chooses anew whenever it is read.
    `torchrun` starts several ranks, each of which makes its share.
    """
    from prunetune.models.ranks import join_ranks
    from prunetune.outputs import FEATURES, OutputFolder
    from prunetune.scripts.caching import cache, read_settings

    settings = read_settings(config, overrides)
    ranks = join_ranks()
    folder = OutputFolder(str(settings.features), FEATURES, settings.overwrite, reads=(settings.model.path,))
    with ranks.open_output(folder), libraries_in(folder.path / "libraries.log"):
        cache(settings, folder, ranks, also_pruner, also_keep, also_config, all_tokens, batch_size)
    ranks.destroy()


command = SchemaCommand(
    "cache",
    RecalibrateConfig,
    callback=run,
    params=[
        config_option(required=True),
        click.Option(
            ["--also-pruner"],
            multiple=True,
            metavar="NAME",
            help="a further pruner, with its default options; may be repeated",
        ),
        click.Option(
            ["--also-keep"],
            multiple=True,
            metavar="BUDGET",
            help="a further budget, of every pruner; may be repeated",
        ),
        click.Option(
            ["--also-config"],
            multiple=True,
            metavar="FILE",
            help="a further configuration, whose pruning alone is read; may be repeated",
        ),
        click.Option(
            ["--all-tokens"],
            is_flag=True,
            help="store all tokens as well, from which methods that read nothing of the tower choose anew",
        ),
        click.Option(["--batch-size"], type=click.IntRange(min=1), default=16, help="images per run of the tower"),
    ],
    help=run.__doc__,
)
