"""``prunetune data check`` and ``prunetune data prepare``."""

import sys
from collections.abc import Callable
from typing import Any

import click

from prunetune.cli.group import SETTINGS, Summarised
from prunetune.cli.options import at_least_one, plugins_option, share


@click.group("data", cls=Summarised, context_settings=SETTINGS)
def command() -> None:
    """Check a recipe's data, or say what to download."""


def recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what both commands take."""
    for option in (
        click.option("--image-root", metavar="DIR", help="folder that the image paths are relative to"),
        click.option("--file", help="data file, for example llava_v1_5_mix665k.json"),
        click.option("--recipe", required=True, help="a name from `prunetune list recipes`, or a YAML file"),
        plugins_option,
    ):
        function = option(function)
    return function


@command.command("prepare")
@recipe_options
def prepare(recipe: str, file: str | None, image_root: str | None) -> None:
    """Say what a recipe needs, what is there and where the rest is to be got; exits with 1 if something is missing."""
    from prunetune.data_recipes.prepare import plan

    text, complete = plan(recipe, file, image_root)
    print(text)
    sys.exit(0 if complete else 1)


@command.command("check")
@recipe_options
@click.option("--model", help="folder or hub id; its tokenizer and template measure lengths")
@click.option("--template", default="model", help="chat template, as model.template names it")
@click.option(
    "--tokens",
    type=click.Choice(["model", "legacy", "nonlegacy_431", "nonlegacy_437"]),
    default="model",
    help="whose tokens, as model.tokens names them",
)
@click.option("--max-length", type=int, callback=at_least_one, default=2048, help="longest sequence in tokens")
@click.option(
    "--max-missing", type=float, callback=share, help="largest share of unusable images; the recipe's, or 0.01"
)
@click.option("--max-broken", type=float, callback=share, help="largest share of broken records; the recipe's, or 0.01")
@click.option("--max-pixels", type=int, callback=at_least_one, default=50_000_000, help="largest image that is decoded")
@click.option("--num-proc", type=int, callback=at_least_one, default=1, help="processes that decode images")
def check(
    recipe: str,
    file: str | None,
    image_root: str | None,
    model: str | None,
    template: str,
    tokens: Any,
    max_length: int,
    max_missing: float | None,
    max_broken: float | None,
    max_pixels: int,
    num_proc: int,
) -> None:
    """Read a recipe's data once and report what is wrong; exits with 1 if it is beyond the thresholds."""
    from prunetune.data_recipes.check import check_data
    from prunetune.data_recipes.recipe import read_recipe, tolerated
    from prunetune.models.loading import checkpoint_folder, load_processor

    processor = load_processor(model) if model else None
    folder = checkpoint_folder(model) if model else None
    report = check_data(recipe, file, image_root, processor, template, max_length, num_proc, max_pixels, tokens, folder)
    print(report.to_text())
    asked = read_recipe(recipe)
    failures = report.failures(tolerated(asked.max_missing, max_missing), tolerated(asked.max_broken, max_broken))
    print("\n".join(f"FAILED: {failure}" for failure in failures) or "ok")
    sys.exit(1 if failures else 0)
