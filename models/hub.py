"""Tuned models in one call, from a folder or the hub; and artefacts to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from pydantic import ValidationError

from prunetune.configs import ModelConfig
from prunetune.models.adapter import check_finite, projector_state
from prunetune.models.arm import Arm
from prunetune.models.errors import CheckpointError
from prunetune.models.loading import CARRIED
from prunetune.models.record import RECORD, base_of, is_export, read_record, required, told_pruning
from prunetune.models.seal import short
from prunetune.pruning import PruningError, PruningSpec
from prunetune.reading import one_line


def load(
    path: str | Path,
    base: str | Path | None = None,
    device: torch.device | str | None = None,
    *,
    dtype: str | None = None,
    text_tower: str | None = None,
) -> Arm:
    """Return the tuned model with the pruner it was tuned for, ready to run; every hash of its record is checked.

    Args:
        path: an adapter's folder, the output of a recalibration, an export, or the hub id of one of them.
        base: folder or hub id of the base; None is the one that the record names. An export needs none.
        device: None is the GPU of this process, or the CPU where there is none.
        dtype: of all weights; None is the recalibration's.
        text_tower: folder or hub id of the pruner's text tower; None is the one that the record names.

    Raises:
        CheckpointError: if there is nothing to load, the base is not there, or a hash differs.
        PruningError: if the pruner is not there, with the plug-ins that the record names.
    """
    folder = artefact_folder(path)
    record = read_record(folder)
    spec = _spec(record, folder, text_tower)
    export = is_export(folder)
    if export and base is not None:
        raise CheckpointError(f"{folder} is an export, which holds its base; leave base away")
    source = str(folder) if export else base_of(folder, record, base)
    values = {**required(record, "model", folder), "path": source}
    if base is not None or export:
        values["revision"] = None  # of the hub id that the record names
    if dtype is not None:
        values["dtype"] = dtype
    try:
        config = ModelConfig.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(
            f"{folder / RECORD}: its model can't be loaded by this version: {one_line(error)}"
        ) from None
    if export:
        arm = Arm.load(config, spec, device=device)
        _check_export(record, folder, arm)
        return arm
    try:
        return Arm.load(config, spec, folder, device)
    except CheckpointError as error:
        if "is neither a folder nor a checkpoint" not in str(error):
            raise
        raise CheckpointError(f"the base of {folder}: {error}; give its folder or hub id as base=...") from error


def artefact_folder(path: str | Path) -> Path:
    """Return the local folder of an adapter or an export, downloading a hub id if it is not cached.

    Raises:
        CheckpointError: if it is neither a folder with a record, nor a hub id that can be fetched.
    """
    folder = Path(path)
    if (folder / "adapter" / RECORD).is_file() and not (folder / RECORD).is_file():
        return folder / "adapter"  # the output of a recalibration
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(path), allow_patterns=list(CARRIED)))
    # Anything from a wrong id to a broken cache or network; the user's way out is the same.
    except Exception as error:
        raise CheckpointError(
            f"{str(path)!r} is neither a folder nor a projector on the hub that could be fetched: {one_line(error)}"
        ) from error


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload an adapter's or an export's folder to the hub, making the repository if it is not there.

    Returns:
        The repository's address.

    Raises:
        CheckpointError: if the folder holds no artefact, or the hub can't be reached or refuses.
    """
    record = read_record(folder)  # nothing goes out that would be refused when it is loaded
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        message = f"prunetune: {told_pruning(record.get('pruning') or {})}, {short(record.get('projector_hash'))}"
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=message)
    # A wrong name, a missing token, no network, a full quota: huggingface_hub has an error for each.
    except Exception as error:
        raise CheckpointError(
            f"{folder} could not be uploaded to {repository!r}: {one_line(error)}; check the name, and log in with "
            "`hf auth login` or set HF_TOKEN; the folder is as it was"
        ) from error
    return str(address)


def _spec(record: dict[str, Any], folder: Path, text_tower: str | None) -> PruningSpec:
    """Return the pruning that a projector was tuned for; raises PruningError where its pruner is not there."""
    values = dict(required(record, "pruning", folder))
    if text_tower is not None:
        values["text_tower"] = text_tower
    try:
        spec = PruningSpec.model_validate(values)
        spec.build()
    except ValidationError as error:
        raise CheckpointError(f"{folder / RECORD}: its pruning is of another version: {one_line(error)}") from None
    except PruningError as error:
        names = [plugin["name"] for plugin in record.get("plugins") or []]
        if not names:
            raise
        raise PruningError(
            f"{error}; {folder} was tuned with the plug-ins {', '.join(names)}: load them first with "
            "prunetune.plugins.load_plugins([...])"
        ) from error
    return spec


def _check_export(record: dict[str, Any], folder: Path, arm: Arm) -> None:
    """Check that an export's weights are those that were written."""
    written, found = record["export"], arm.base.hashes
    for name, own in (
        ("frozen_hash", found.frozen_hash),
        ("original_projector_hash", found.original_projector_hash),
    ):
        if written.get(name) != own:
            what = "projector" if name.startswith("original") else "frozen weights"
            raise CheckpointError(
                f"export {folder} was changed after it was written: its {what} are {short(own)}, its record says "
                f"{short(written.get(name))}; export it again"
            )
    expected = record.get("text_tower_hash")
    if expected != arm.text_tower_hash:
        raise CheckpointError(
            f"export {folder} was recalibrated with another text tower: {short(expected)}, {arm.spec.text_tower!r} is "
            f"{short(arm.text_tower_hash)}; give its own as text_tower=..."
        )
    check_finite(projector_state(arm.model), f"export {folder}")
