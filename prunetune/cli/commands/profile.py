"""``prunetune profile``."""

from __future__ import annotations

import re

import click

from prunetune.cli.options import at_least_one
from prunetune.cli.schema import SchemaCommand, config_option
from prunetune.configs import TableConfig


def run(
    config: str,
    sizes: tuple[int, ...],
    repeats: int,
    warmup: int,
    new_tokens: int,
    clients: int,
    requests: int,
    at_most: int,
    rounds: int,
    device: str | None,
    random_weights: bool,
    analytic: bool,
    text: int,
    side: int,
    overrides: list[str],
) -> None:
    """Measure what every arm of a table costs, the dense one beside it in every round.

    FLOP by part and the bytes of the key-value cache, computed and checked against what torch counts and what the
    cache holds; milliseconds of each stage, of the first token and end to end; tokens a second; many requests in
    flight; peak memory and energy on GPUs. `profile.json` and `profile.md` are written into the table's folder, and
    `prunetune table` shows them as columns.
    """
    from prunetune.configs import load_config
    from prunetune.scripts.profiling.make import computed_table, profile_table
    from prunetune.scripts.profiling.measure import Settings

    settings = load_config(TableConfig, config, overrides)
    if analytic:
        print(computed_table(settings, new_tokens, text, side))
        return
    how = Settings(sizes, repeats, warmup, new_tokens, clients, requests, at_most, rounds)
    folder = profile_table(settings, how, device, random_weights, text, side)
    print(f"profile: {folder}")


def _sizes(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    """Return batch sizes, each once and in their order."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", value):
        raise click.BadParameter(f"{option.opts[0]} is one batch size or several with commas, as 1,16; got {value!r}")
    return tuple(dict.fromkeys(int(size) for size in value.split(",")))


def _not_negative(context: click.Context, option: click.Parameter, value: int) -> int:
    if value < 0:
        raise click.BadParameter(f"{option.opts[0]} is at least 0, got {value}")
    return value


def _two(context: click.Context, option: click.Parameter, value: int) -> int:
    if value < 2:
        raise click.BadParameter(f"{option.opts[0]} is at least 2, the first token and one to decode; got {value}")
    return value


def _count(name: str, default: int, about: str) -> click.Option:
    return click.Option([name], type=int, callback=at_least_one, default=default, help=about)


command = SchemaCommand(
    "profile",
    TableConfig,
    callback=run,
    params=[
        config_option(required=True),
        click.Option(["--sizes"], callback=_sizes, default="1", help="batch sizes, with commas: 1,16"),
        _count("--repeats", 10, "measured rounds; of fewer than six there is no 95 % interval"),
        click.Option(["--warmup"], type=int, callback=_not_negative, default=2, help="rounds before them"),
        click.Option(["--new-tokens"], type=int, callback=_two, default=16, help="length of every answer"),
        click.Option(
            ["--clients"], type=int, callback=_not_negative, default=0,
            help="requests in flight of a load test; 0 makes none",
        ),
        _count("--requests", 64, "requests of each of its rounds"),
        _count("--at-most", 8, "requests that one of its batches takes"),
        _count("--rounds", 6, "of the load test, after one to warm up"),
        click.Option(["--device"], help="cuda, cuda:1 or cpu; the GPU if there is one"),
        click.Option(["--random-weights"], is_flag=True, help="the models' shapes with random weights, on noise"),
        click.Option(["--analytic"], is_flag=True, help="compute from the shapes alone, print it, and write nothing"),
        _count("--text", 60, "text tokens of a request that is computed or made up"),
        click.Option(
            ["--image", "side"], type=int, callback=at_least_one, default=672,
            help="height and width of its image, where the model takes any size",
        ),
    ],
    help=run.__doc__,
)  # fmt: skip
