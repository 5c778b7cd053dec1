"""``prunetune export``."""

from pathlib import Path

import click

from prunetune.cli.options import DTYPES, overwrite_option


@click.command("export")
@click.option("--model", required=True, help="folder or hub id of the base")
@click.option("--revision", help="hub revision of the base")
@click.option("--adapter", required=True, metavar="DIR", help="the adapter folder of a recalibration")
@click.option("--dtype", type=DTYPES, default="float32", help="dtype of the written weights")
@click.option("--output", type=Path, required=True, help="folder that is written")
@overwrite_option
def command(model: str, revision: str | None, adapter: str, dtype: str, output: Path, overwrite: bool) -> None:
    """Merge a recalibrated projector into a full stock checkpoint."""
    from prunetune.configs import ModelConfig
    from prunetune.models import Arm, export_merged
    from prunetune.outputs import EXPORT, OutputFolder

    config = ModelConfig.model_validate({"path": model, "revision": revision, "dtype": dtype})
    with OutputFolder(output, EXPORT, overwrite, reads=(model, adapter)):  # before minutes of loading
        arm = Arm.load(config, adapter=adapter, device="cpu")
        export_merged(arm.model, arm.processor, output)
    print(f"stock checkpoint and mm_projector.bin: {output}")
