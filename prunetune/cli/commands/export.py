"""``prunetune export``."""

from pathlib import Path

import click

from prunetune.cli.options import DTYPES, overwrite_option


@click.command("export")
@click.option("--model", required=True, help="folder or hub id of the base")
@click.option("--revision", help="hub revision of the base")
@click.option("--adapter", required=True, metavar="DIR", help="the adapter folder of a recalibration")
@click.option(
    "--strength", type=float, help="merge w0 + A (w - w0): 0 is the base's projector, 1 the tuned one; 1 is the default"
)
@click.option("--dtype", type=DTYPES, default="float32", help="dtype of the written weights")
@click.option("--output", type=Path, required=True, help="folder that is written")
@click.option(
    "--for",
    "engine",
    type=click.Choice(["vllm", "openvino"]),
    help="add what this engine needs, and refuse what it can't serve",
)
@overwrite_option
@click.option("--rows", type=Path, metavar="FILE", help="table.csv of a comparison with this adapter, for the card")
@click.option("--push-to-hub", metavar="REPO", help="upload the folder to this repository of the Hugging Face hub")
@click.option("--private", is_flag=True, help="make the repository private, if it is new")
def command(
    model: str,
    revision: str | None,
    adapter: str,
    strength: float | None,
    dtype: str,
    output: Path,
    engine: str | None,
    overwrite: bool,
    rows: Path | None,
    push_to_hub: str | None,
    private: bool,
) -> None:
    """Merge a recalibrated projector into a full stock checkpoint."""
    from prunetune.configs import ModelConfig
    from prunetune.models import Arm, CheckpointError, export_merged, read_record
    from prunetune.models.card import measured_rows
    from prunetune.models.derived import dialled, put_projector
    from prunetune.models.hub import push
    from prunetune.models.record import warning
    from prunetune.outputs import EXPORT, OutputFolder

    config = ModelConfig.model_validate({"path": model, "revision": revision, "dtype": dtype})
    record = read_record(adapter)
    if (record.get("pruning") or {}).get("choose_with", "tuned") == "original":
        raise CheckpointError(
            f"{adapter} was tuned on tokens that the original projector chooses, which an export does not hold; load "
            "the base with the adapter, or recalibrate with pruning.choose_with: tuned"
        )
    measured = measured_rows(rows, record) if rows is not None and strength is None else None
    extra = None
    if engine is not None:
        from prunetune.serving.export import ENGINES

        extra = ENGINES[engine](record, adapter)
    with OutputFolder(output, EXPORT, overwrite, reads=(model, adapter)):  # before minutes of loading
        arm = Arm.load(config, adapter=adapter, device="cpu")
        if strength is not None:
            tensors, record = dialled(arm.base, Path(adapter), strength)
            measured = measured_rows(rows, record) if rows is not None else None
            put_projector(arm.model, tensors)
        if extra is not None:
            extra.prepare(arm)
        finish = None if extra is None else extra.finish
        export_merged(arm.model, arm.processor, output, record, measured, finish=finish)
    print(f"stock checkpoint and mm_projector.bin: {output}")
    print(f"warning: {warning(record)}")
    if extra is not None:
        print(extra.words(output))
    if push_to_hub is not None:
        print(f"uploaded: {push(output, push_to_hub, private)}")
