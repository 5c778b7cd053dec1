"""``prunetune card``."""

from pathlib import Path

import click


@click.command("card")
@click.argument("folder", type=Path)
@click.option("--rows", type=Path, metavar="FILE", help="table.csv of a comparison with this projector")
@click.option("--push-to-hub", metavar="REPO", help="upload the folder to this repository of the Hugging Face hub")
@click.option("--private", is_flag=True, help="make the repository private, if it is new")
def command(folder: Path, rows: Path | None, push_to_hub: str | None, private: bool) -> None:
    """Write the model card (README.md) of FOLDER, an adapter or an export, anew: with measured rows, or without."""
    from prunetune.models.card import write_card

    print(write_card(folder, rows))
    if push_to_hub is not None:
        from prunetune.models.hub import push

        print(f"uploaded: {push(folder, push_to_hub, private)}")
