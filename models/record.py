"""``prunetune.json``: what an adapter or an export says of itself. Reading it needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import yaml
from pydantic import ValidationError

from prunetune.assets import shipped
from prunetune.models.errors import CheckpointError
from prunetune.models.seal import sealed, short, why_unsealed
from prunetune.models.stored import BaseHashes
from prunetune.pruning.spec import StageSpec
from prunetune.reading import read_json

RECORD = "prunetune.json"
FORMAT = 2
"""Of new records. Format 1 had no seal, and did not name the projector that training started from."""
_READ = (1, 2)
# What is read of a record: a file of format 1 has no seal, and may hold anything.
_KINDS: dict[str, type] = {
    **dict.fromkeys(("pruning", "model", "data", "train", "export", "prunetune", "versions", "llm_tokens"), dict),
    **dict.fromkeys(("plugins", "projectors", "soup"), list),
    **dict.fromkeys(("base_model", "base_revision", "frozen_hash", "original_projector_hash", "settings_hash"), str),
    **dict.fromkeys(("text_tower_hash", "projector_hash", "license", "from"), str),
    "started_from": dict,
    "strength": float,
}
ENTRY = "prunetune"
"""Of an export's config.json."""
ELASTIC = (
    "tuned for several pruners and budgets, and on unpruned images too: measure what it costs there before you use it "
    "without pruning; load it with prunetune.load(...)"
)
WARNING = (
    "tuned for {pruner} at {keep} visual tokens: without this pruning it answers worse than the untouched base; load "
    "it with prunetune.load(...)"
)

INSIDE = (
    "tuned for {pruning}: without this pruning it answers worse than the untouched base, and stages inside the LLM run "
    "here alone; load it with prunetune.load(...)"
)


def read_record(folder: str | Path) -> dict[str, Any]:
    """Return the ``prunetune.json`` of an adapter or an export.

    Raises:
        CheckpointError: if the folder is no recalibrated projector, or its record is broken, of a format that this
            version can't read, or was edited.
    """
    record = parsed_record(folder)
    wrong = why_unsealed(record) if record["format"] == FORMAT else None
    if wrong is not None:
        raise CheckpointError(f"{Path(folder) / RECORD} can't be trusted: {wrong}; take the folder as it was written")
    return record


def parsed_record(folder: str | Path) -> dict[str, Any]:
    """Return a record whose seal may not hold; raises CheckpointError as :func:`read_record` does for all else."""
    path = Path(folder) / RECORD
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is no recalibrated projector: {RECORD} is missing; give the `adapter` folder of "
            "a recalibration's output"
        )
    record = read_json(path, CheckpointError)
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} is no record: it holds {type(record).__name__}, expected an object")
    if record.get("format") not in _READ:
        raise CheckpointError(
            f"{path} has format {record.get('format')!r}, this version reads {' and '.join(map(str, _READ))}; "
            "recalibrate again, or use the version that wrote it"
        )
    for name, kind in _KINDS.items():
        if record.get(name) is not None and not isinstance(record[name], kind):
            raise CheckpointError(
                f"{path} is broken: {name} is {type(record[name]).__name__}, expected {kind.__name__}; take the folder "
                "as it was written"
            )
    if not all(isinstance(plugin, dict) and "name" in plugin for plugin in record.get("plugins") or []):
        raise CheckpointError(f"{path} is broken: a plug-in has no name; take the folder as it was written")
    return record


def text_of(record: Mapping[str, Any]) -> str:
    """Return a record as its file's text, with its seal."""
    return json.dumps(sealed(record), indent=2) + "\n"


def required(record: Mapping[str, Any], name: str, folder: str | Path) -> Any:
    """Return a field of a record; raises CheckpointError if it has none."""
    if record.get(name) is None:
        raise CheckpointError(f"{Path(folder) / RECORD} lacks {name!r}; recalibrate again, or take another adapter")
    return record[name]


def check_base(record: Mapping[str, Any], folder: str | Path, base: BaseHashes) -> None:
    """Check that a projector was recalibrated from this very base.

    Raises:
        CheckpointError: if the frozen weights or the projector that training started from are others, with both hashes.
    """
    frozen = str(required(record, "frozen_hash", folder))
    if frozen != base.frozen_hash:
        raise CheckpointError(
            f"projector {folder} was recalibrated for another base: it expects {record.get('base_model')!r} with "
            f"frozen weights {short(frozen)}, this model's are {short(base.frozen_hash)}; load it with its own base"
        )
    if record["format"] == 1:  # which did not name it
        return
    original = str(required(record, "original_projector_hash", folder))
    if original != base.original_projector_hash:
        raise CheckpointError(
            f"projector {folder} was recalibrated from another projector: it started from {short(original)}, this base "
            f"holds {short(base.original_projector_hash)}; load it with the untouched {record.get('base_model')!r}, "
            "not with an export or a merged model"
        )


def check_projector(record: Mapping[str, Any], folder: str | Path, found: str) -> None:
    """Check the hash of an adapter's stored tensors; raises CheckpointError if it is not the record's, with both."""
    expected = str(required(record, "projector_hash", folder))
    if expected != found:
        raise CheckpointError(
            f"projector {folder} was changed after it was written: its tensors' hash is {short(found)}, its record "
            f"says {short(expected)}; take the folder as it was written, or recalibrate again"
        )


def adapter_folder(path: str | Path) -> Path:
    """Return the folder of an adapter, which may be named by the output of its recalibration.

    Raises:
        CheckpointError: if it holds none, its record was edited, or it is an export.
    """
    folder = Path(path)
    if (folder / "adapter" / RECORD).is_file() and not (folder / RECORD).is_file():
        folder = folder / "adapter"
    if "export" in read_record(folder):
        raise CheckpointError(
            f"{folder} is an export, whose weights are merged; give the `adapter` folder that it was made of"
        )
    return folder


def portable(path: str | None) -> str | None:
    """Return a hub id or a relative path as it is, and an absolute one as its last part, which says no machine's."""
    if path is None or not (PurePath(path).is_absolute() or PureWindowsPath(path).is_absolute()):
        return path
    return PurePath(path.replace("\\", "/")).name


def base_of(folder: Path, record: Mapping[str, Any], base: str | Path | None = None) -> str:
    """Return where the base is: as it is given, as the record has it, or as the run beside the adapter had it."""
    if base is not None:
        return str(base)
    named = str(required(record, "base_model", folder))
    if Path(shipped(named)).is_dir():
        return named
    # The record names no machine's folder; the run's own configuration, which stays on the machine, does.
    try:
        own = yaml.safe_load((folder.parent / "config.yaml").read_text(encoding="utf-8"))["model"]["path"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return named
    return own if isinstance(own, str) and Path(own).is_dir() else named


def warning(record: Mapping[str, Any]) -> str:
    """Return in one line what a tuned projector is for."""
    pruning = record.get("pruning") or {}
    if (record.get("elastic") or {}).get("dense"):
        return ELASTIC
    if pruning.get("stages"):
        return INSIDE.format(pruning=told_pruning(pruning))
    return WARNING.format(pruner=pruning.get("pruner", "?"), keep=pruning.get("keep", "?"))


def told_pruning(pruning: Mapping[str, Any]) -> str:
    """Return a record's pruning for people: ``divprune, 64``; ``fastv, 32 a layer``; ``divprune, 64, then vtw``."""
    parts = []
    if pruning.get("pruner") != "identity" or not pruning.get("stages"):
        parts.append(f"{pruning.get('pruner', '?')}, {pruning.get('keep', '?')}")
    return ", then ".join([*parts, *told_stages(pruning)])


def told_stages(pruning: Mapping[str, Any]) -> list[str]:
    """Return the stages of a record's pruning for people, each with its budget."""
    told = []
    for stage in pruning.get("stages") or []:
        try:
            own = StageSpec.model_validate(stage)
        except ValidationError:  # another version wrote it
            told.append(str(stage.get("name", "?")) if isinstance(stage, Mapping) else "?")
            continue
        told.append(f"{own.label}, {own.budget}" if own.budget else own.label)
    return told


def exported_record(record: Mapping[str, Any], written: BaseHashes) -> dict[str, Any]:
    """Return the record of an export: the adapter's, and under ``export`` the hashes of what was written."""
    return {**record, "format": FORMAT, "export": written.record()}


def config_entry(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an export's config.json says of it, for programs that read no other file."""
    names = ("base_model", "pruning", "projector_hash")
    return {**{name: record.get(name) for name in names}, "warning": warning(record)}


def is_export(folder: str | Path) -> bool:
    """Return whether a folder is an export, by its record or by the entry in its configuration."""
    if (Path(folder) / RECORD).is_file():
        return "export" in read_record(folder)
    config = Path(folder) / "config.json"
    if not config.is_file():
        return False
    try:
        return ENTRY in json.loads(config.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
        return False  # whoever loads it says what is wrong with it
