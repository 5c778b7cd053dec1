"""``prunetune soup``."""

from pathlib import Path

import click

from prunetune.cli.options import overwrite_option


@click.command("soup")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER ADAPTER ...")
@click.option("--weights", help="one for each adapter, as 1,1,2; all alike by default")
@click.option("--output", type=Path, required=True, help="folder whose `adapter` is written")
@overwrite_option
def command(adapters: tuple[str, ...], weights: str | None, output: Path, overwrite: bool) -> None:
    """Write the mean of several tuned projectors of one base, as an adapter for the pruning of the first."""
    from prunetune.models import write_adapter
    from prunetune.models.derived import soup
    from prunetune.models.record import adapter_folder
    from prunetune.outputs import SOUP, OutputFolder

    folders = [adapter_folder(adapter) for adapter in adapters]
    tensors, record = soup(folders, None if weights is None else _numbers(weights))
    with OutputFolder(output, SOUP, overwrite, reads=(*adapters, *folders)):
        write_adapter(output / "adapter", tensors, folders[0], record)
    print(f"the mean of {len(folders)} projectors: {output / 'adapter'}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"--weights is numbers with commas, as 1,1,2, got {text!r}") from None
