"""``prunetune answers``."""

import click

from prunetune.cli.options import at_least_one
from prunetune.cli.schema import SchemaCommand, config_option
from prunetune.configs import RecalibrateConfig


def run(
    config: str,
    images: str | None,
    questions: str | None,
    ask: int,
    each: int,
    max_new_tokens: int,
    batch_size: int,
    overrides: list[str],
) -> None:
    """Write the unpruned model's own answers to questions, as a recipe to train on; an interrupted run goes on.

    The configuration says model and data; `--output FILE.json` is the file, beside which its recipe (FILE.yaml) and a
    sealed record (FILE.record.json) are written. Answers that the data holds are not read. Of images without questions,
    `--images DIR`, general instructions are asked, those of a file, or what the model asks itself. `torchrun` starts
    several ranks, each of which answers its share.
    """
    from prunetune.configs import load_config
    from prunetune.models.ranks import join_ranks
    from prunetune.scripts.answers import Asking, answers

    settings = load_config(RecalibrateConfig, config, overrides)
    ranks = join_ranks()
    answers(settings, Asking(images, questions, ask, each, max_new_tokens, batch_size), ranks)
    ranks.destroy()


def _number(flag: str, default: int, about: str) -> click.Option:
    return click.Option([flag], type=int, callback=at_least_one, default=default, help=about)


command = SchemaCommand(
    "answers",
    RecalibrateConfig,
    callback=run,
    params=[
        config_option(required=True),
        click.Option(["--images"], metavar="DIR", help="images without questions, in place of the recipe"),
        click.Option(
            ["--questions"], metavar="FILE", help="what is asked about them, one a line; a shipped list if not"
        ),
        click.Option(["--ask"], type=int, default=0, help="questions that the model asks about each image itself"),
        _number("--each", 1, "questions of the list that each image gets"),
        _number("--max-new-tokens", 128, "longest answer in tokens"),
        _number("--batch-size", 16, "questions that are answered at once"),
    ],
    help=run.__doc__,
)
