"""``prunetune teach``."""

import click

from prunetune.cli.options import at_least_one
from prunetune.cli.schema import SchemaCommand, config_option
from prunetune.configs import RecalibrateConfig
from prunetune.screen import libraries_in


def run(config: str, top: int, hidden: bool, batch_size: int, overrides: list[str]) -> None:
    """Run the teacher once over all samples, into the folder that `output` names; an interrupted run goes on.

    The teacher is the model with all visual tokens and its original projector. What is stored are its likeliest words
    at answer positions, the mean of its visual tokens and, with --hidden, its hidden states at text positions.
    `prunetune recalibrate` with `objective.teacher` then runs no teacher beside the model. `torchrun` starts several
    ranks, each of which makes its share.
    """
    from prunetune.configs import load_config
    from prunetune.models.ranks import join_ranks
    from prunetune.outputs import TEACHER, OutputFolder
    from prunetune.train.objectives.teach import teach

    settings = load_config(RecalibrateConfig, config, overrides)
    ranks = join_ranks()
    folder = OutputFolder(settings.output, TEACHER, settings.overwrite, reads=(settings.model.path,))
    with ranks.open_output(folder), libraries_in(folder.path / "libraries.log"):
        teach(settings, folder, ranks, top, hidden, batch_size)
    ranks.destroy()


command = SchemaCommand(
    "teach",
    RecalibrateConfig,
    callback=run,
    params=[
        config_option(required=True),
        click.Option(
            ["--top"], type=int, callback=at_least_one, default=32, help="likeliest words stored of a position"
        ),
        click.Option(["--hidden"], is_flag=True, help="store hidden states at text positions, in float16"),
        click.Option(["--batch-size"], type=int, callback=at_least_one, default=16, help="samples at once"),
    ],
    help=run.__doc__,
)
