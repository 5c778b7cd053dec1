"""``prunetune visualize``."""

from pathlib import Path

import click

from prunetune.cli.options import DTYPES, at_least_one, overwrite_option, plugins_option
from prunetune.outputs import VISUALIZATION, OutputFolder
from prunetune.screen import libraries_in


@click.command("visualize")
@click.argument("pruners", nargs=-1)
@click.option("--model", default="assets/tiny_vlm", help="folder or hub id")
@click.option("--dtype", type=DTYPES, default="float32", help="dtype of all weights")
@click.option("--keep", type=int, default=16, help="visual tokens that each method keeps")
@click.option("--text-tower", help="CLIP checkpoint of the vision tower, for methods that read the question")
@click.option("--task", default="tiny_world_validation", help="a benchmark whose images are shown")
@click.option("--data", metavar="DIR", help="folder of the benchmark's published files")
@click.option("--count", type=int, default=4, callback=at_least_one, help="how many images")
@click.option("--output", type=Path, default=Path("runs/visualize"), help="folder of the PNG files")
@overwrite_option
@plugins_option
def command(
    pruners: tuple[str, ...],
    model: str,
    dtype: str,
    keep: int,
    text_tower: str | None,
    task: str,
    data: str | None,
    count: int,
    output: Path,
    overwrite: bool,
) -> None:
    """Draw the tokens that PRUNERS keep over images: fastervlm, vispruner, prismprune and divprune if none is named."""
    from prunetune.configs import ModelConfig
    from prunetune.evaluation.run.visualize import visualize
    from prunetune.pruning import PruningSpec

    names = pruners or ("fastervlm", "vispruner", "prismprune", "divprune")
    specs = [PruningSpec(name, keep, text_tower=text_tower) for name in names]
    config = ModelConfig.model_validate({"path": model, "dtype": dtype})
    folder = OutputFolder(output, VISUALIZATION, overwrite, reads=(model, data))
    with folder, libraries_in(output / "libraries.log"):
        written = visualize(config, specs, task, count, output, data)
    print("\n".join(map(str, written)))
