"""``prunetune dial``."""

from pathlib import Path

import click

from prunetune.cli.options import at_least_one, overwrite_option, plugins_option


@click.command("dial")
@click.option("--adapter", required=True, metavar="DIR", help="an adapter, or the output of its recalibration")
@click.option("--base", metavar="DIR", help="folder or hub id of the base, instead of the one that the record names")
@click.option("--strengths", default="0,0.25,0.5,0.75,1", help="0 is the base's projector, 1 the tuned one")
@click.option("--recipe", help="measure on what this recipe holds out, or on all of it; else on what the run held out")
@click.option("--file", help="data file, for recipes that read one")
@click.option("--image-root", help="folder that image paths are relative to")
@click.option("--samples", type=int, help="measure on so many of these samples")
@click.option("--batch-size", type=int, callback=at_least_one, default=16, help="samples at once")
@click.option("--choose", is_flag=True, help="write the adapter of the lowest pruned loss")
@click.option(
    "--dense-within", type=float, help="with --choose: its loss with all tokens is at most so much above the base's"
)
@click.option("--output", type=Path, default=Path("runs/dial"), help="folder of table, plot and adapter")
@overwrite_option
@plugins_option
def command(
    adapter: str,
    base: str | None,
    strengths: str,
    recipe: str | None,
    file: str | None,
    image_root: str | None,
    samples: int | None,
    batch_size: int,
    choose: bool,
    dense_within: float | None,
    output: Path,
    overwrite: bool,
) -> None:
    """Measure the projectors between the base's and a tuned one: w0 + A (w - w0), pruned and with all tokens."""
    numbers = _numbers(strengths)
    if dense_within is not None and not choose:
        raise click.UsageError("--dense-within says which strength is chosen; add --choose")
    if samples is not None and samples < 1:
        raise click.BadParameter(f"--samples is at least 1, got {samples}")
    from prunetune.models.record import adapter_folder
    from prunetune.train.dial import chosen, given_slice, lines, run_dial

    held = None
    if recipe is not None:
        held = given_slice(adapter_folder(adapter), recipe, file, image_root, samples)
    points = run_dial(
        adapter,
        output,
        numbers,
        held,
        base=base,
        samples=samples,
        size=batch_size,
        choose=choose,
        dense_within=dense_within,
        overwrite=overwrite,
    )
    best = chosen(points, dense_within) if choose else None
    print("\n".join(lines(points, best)))
    if best is not None:
        print(f"the adapter of strength {best.strength:g}: {output / 'adapter'}")


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
        if not all(abs(number) < 100 for number in numbers):
            raise ValueError
    except ValueError:
        raise click.BadParameter(f"--strengths is numbers with commas, as 0,0.5,1, got {text!r}") from None
    return numbers
