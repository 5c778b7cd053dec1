"""What of a table is there already, and is what the YAML asks for."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from prunetune.configs import ConfigError, TableConfig, to_yaml
from prunetune.errors import PrunetuneError
from prunetune.evaluation.records import MANIFEST, RESULTS, Manifest, read_begun, results_hash
from prunetune.models.record import check_projector, read_record
from prunetune.models.stored import TENSORS, stored_projector_hash
from prunetune.reading import parse_yaml, read_yaml
from prunetune.scripts.tables.cells import Cell, Training
from prunetune.train.checkpoints import FINISHED


def is_trained(training: Training) -> bool:
    """Return whether a recalibration has finished with these very settings and its adapter is as it was written."""
    output = Path(training.config.output)
    if not (output / FINISHED).is_file() or not _same_config(output, training.config, "features"):
        return False
    try:
        record = read_record(training.adapter)
        check_projector(record, training.adapter, stored_projector_hash(training.adapter / TENSORS))
    except (PrunetuneError, OSError):
        return False
    return True


def is_evaluated(cell: Cell) -> bool:
    """Return whether a cell is complete, of these very settings and this very projector, and as it was written.

    Which feature cache it read says nothing: what is in one is what its images give. The weights of the base are not
    read again here: cells of one model that ran with other ones are refused when they are put together.
    """
    if not (cell.folder / MANIFEST).is_file() or not _same_config(cell.folder, cell.config, "features"):
        return False
    try:
        manifest = read_begun(cell.folder)
        return manifest.complete and _same_projector(cell, manifest) and _as_written(cell.folder, manifest)
    except PrunetuneError:
        return False


def is_of_other_settings(cell: Cell) -> bool:
    """Return whether a cell's folder holds what the YAML does not ask for, which can't be gone on with."""
    if not (cell.folder / MANIFEST).is_file() or is_evaluated(cell):
        return False
    try:
        manifest = read_begun(cell.folder)
        # A finished one may have read another cache; one that goes on must read its own.
        same = _same_config(cell.folder, cell.config, *(["features"] if manifest.complete else []))
        return not (same and _same_projector(cell, manifest))
    except PrunetuneError:
        return True


def is_trained_otherwise(training: Training) -> bool:
    """Return whether a recalibration's folder holds one of other settings, or an adapter that was changed since."""
    output = Path(training.config.output)
    if not (output / "config.yaml").is_file() or is_trained(training):
        return False
    return (output / FINISHED).is_file() or not _same_config(output, training.config)


def remade(config: TableConfig, training: Training) -> list[str]:
    """Return what makes a recalibration begin anew, where its folder holds another one and the YAML says so."""
    return ["--overwrite"] if config.remake and is_trained_otherwise(training) else []


def items_done(cell: Cell) -> int:
    """Return how many items of a cell were answered: lines of all its shards."""
    done = 0
    for file in cell.folder.glob("results*.jsonl"):
        try:
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    done += block.count(b"\n")
        except OSError:  # gathered just now
            continue
    return done


def _same_projector(cell: Cell, manifest: Manifest) -> bool:
    if cell.config.adapter is None:
        return True
    return bool(read_record(cell.config.adapter).get("projector_hash") == manifest.projector.stored_hash)


def _as_written(folder: Path, manifest: Manifest) -> bool:
    return (folder / RESULTS).is_file() and results_hash(folder) == manifest.results_hash


def _same_config(folder: Path, config: BaseModel, *but: str) -> bool:
    """Return whether a folder's effective configuration is this one, but for some fields."""
    try:
        written = read_yaml(folder / "config.yaml", ConfigError)
    except (OSError, ConfigError):
        return False
    asked = parse_yaml(to_yaml(config.model_copy(update={"overwrite": False})), "the configuration", ConfigError)
    # Where numbers were sent to changes none of them.
    for values in (written, asked):
        if not isinstance(values, dict):
            return False
        for name in ("tracking", *but):
            values.pop(name, None)
    return bool(written == asked)
