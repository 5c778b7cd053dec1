"""``prunetune visualize``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prunetune.cli.options import DTYPES
from prunetune.cli.schema import SchemaCommand, config_option
from prunetune.configs import VisualizeConfig
from prunetune.screen import libraries_in

if TYPE_CHECKING:
    from prunetune.configs import ShownMethod

_OWN = {"model": "model.path", "dtype": "model.dtype", "template": "model.template", "text_tower": "pruning.text_tower"}
"""Short options, by the fields that they set."""
_SOURCES = {"--task", "--images", "--videos"}
"""Options that say what is drawn; without any it is the toy world."""


def run(
    words: tuple[str, ...],
    config: str | None,
    image: tuple[str, ...],
    video: tuple[str, ...],
    keep: tuple[str, ...],
    option: tuple[str, ...],
    adapter: tuple[str, ...],
    format: str | None,
    overwrite: bool,
    plugins: tuple[str, ...],
    overrides: list[str],
    **own: str | None,
) -> None:
    """Draw what PRUNERS keep of images, and what the model answers: a row a method, a column a budget.

    Kept, merged and dropped tokens over each image; the answers of the model with all tokens, pruned, and pruned with a
    tuned projector; maps of the attention and of the closeness to the question that methods go by. Of a benchmark, or
    of your own images with a question. Without a name: fastervlm, vispruner, prismprune and divprune.
    """
    from prunetune.configs import load_config
    from prunetune.configs.visualize import with_adapters, with_options
    from prunetune.evaluation.visual.run import output_folder, visualize

    pruners, others = _sorted(words)
    named = any(word.partition("=")[0] in _SOURCES for word in others)
    said = _said(config, pruners, image, video, keep, format, overwrite, plugins, own)
    if config is None and not (image or video or named):
        said += ["--task", "tiny_world_validation"]
    settings = load_config(VisualizeConfig, config, [*said, *others])
    methods: list[ShownMethod] = with_options(settings.methods, list(option))
    settings = settings.model_copy(update={"methods": with_adapters(methods, list(adapter))})
    with output_folder(settings), libraries_in(Path(settings.output) / "libraries.log"):
        written = visualize(settings)
    print("\n".join(map(str, written)))


def _sorted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of pruners, and the options of the schema with their values."""
    pruners, others = [], []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            pruners.append(word)
            continue
        others.append(word)
        if "=" not in word and rest:
            others.append(rest.pop(0))
    return pruners, others


def _said(
    config: str | None,
    pruners: Sequence[str],
    image: Sequence[str],
    video: Sequence[str],
    keep: Sequence[str],
    format: str | None,
    overwrite: bool,
    plugins: Sequence[str],
    own: dict[str, str | None],
) -> list[str]:
    """Return what short options say as options of the schema."""
    said: list[str] = []
    if config is None:  # a file says all of this by itself
        said += ["--model.path", "assets/tiny_vlm", "--model.dtype", "float32"]
    for name, value in own.items():
        if value is not None:
            said += [f"--{_OWN.get(name, name)}", _quoted(value)]
    lists = {"methods": pruners, "images": image, "videos": video, "plugins": plugins}
    for name, values in lists.items():
        if values:
            said += [f"--{name}", _list(map(_quoted, values))]
    if keep:
        # As in YAML: 64 and 0.111 are numbers, 11.1% is none.
        said += ["--budgets", _list(part.strip() for text in keep for part in text.split(","))]
    if format is not None:
        said += ["--formats", _list(_quoted(part.strip()) for part in format.split(","))]
    return [*said, "--overwrite", "true"] if overwrite else said


def _quoted(text: str) -> str:
    """Return text that YAML reads as text, whatever is in it."""
    return json.dumps(text)


def _list(parts: Iterable[str]) -> str:
    return f"[{', '.join(parts)}]"


def _several(name: str, about: str, metavar: str) -> click.Option:
    return click.Option([name], multiple=True, metavar=metavar, help=about)


command = SchemaCommand(
    "visualize",
    VisualizeConfig,
    callback=run,
    params=[
        click.Argument(["words"], nargs=-1, metavar="[PRUNERS]...", type=click.UNPROCESSED),
        config_option(),
        click.Option(["--model"], help="folder or hub id; assets/tiny_vlm without --config"),
        click.Option(["--dtype"], type=DTYPES, help="dtype of all weights; float32 without --config"),
        click.Option(["--template"], help="chat template, as model.template"),
        click.Option(["--text-tower"], help="CLIP checkpoint of the vision tower, for methods that read the question"),
        _several("--image", "an image of your own, or a folder of them; may be repeated", "FILE"),
        _several("--video", "a video of your own, or a folder of its frames; may be repeated", "FILE"),
        _several("--keep", "budgets, with commas: 64,0.111,11.1%; may be repeated", "BUDGET"),
        _several("--option", "an option of a method, METHOD.OPTION=VALUE; may be repeated", "TEXT"),
        _several("--adapter", "a projector tuned for a method, METHOD=FOLDER; may be repeated", "TEXT"),
        click.Option(["--format"], help="png, svg, html, with commas"),
        click.Option(["--overwrite"], is_flag=True, help="write into a folder of others, and change none of its files"),
        _several("--plugins", "a module or .py file that registers something; may be repeated", "FILE"),
    ],
    help=run.__doc__,
)
