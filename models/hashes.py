"""Hashes of weights and of the files that decide how a checkpoint behaves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prunetune.models.loading import CheckpointError
from prunetune.reading import one_line


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names, dtypes, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        # One tensor at a time: a checkpoint on the GPU need not fit the memory of the host twice.
        tensor = tensors[name].detach().cpu().contiguous()
        head = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        digest.update(head.encode())
        # As bytes, because NumPy has no bfloat16.
        values = tensor.reshape(-1).view(torch.uint8)
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def frozen_files_hash(folder: Path, projectors: tuple[str, ...]) -> str:
    """Return a SHA-256 of all stored weights but the projector's: the same for every dtype they are loaded in.

    It says which base a projector belongs to: records and manifests hold it as ``frozen_hash``. That training changed
    no frozen weight is another hash, :func:`prunetune.train.trainer.frozen_tensors_hash`, of tensors in memory in the
    run's dtype; it is compared within a run and never stored.

    Raises:
        CheckpointError: if the folder has no safetensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} holds no .safetensors weights; convert the checkpoint with save_pretrained first"
        )
    digest = hashlib.sha256()
    for file in files:
        try:
            _add_frozen(digest, file, projectors)
        except (SafetensorError, OSError) as error:  # also a file that the model itself does not use
            raise CheckpointError(f"{file} can't be read: {one_line(error)}; fetch it again or remove it") from error
    return digest.hexdigest()


def _add_frozen(digest: Any, file: Path, projectors: tuple[str, ...]) -> None:
    with safe_open(file, framework="pt") as weights:
        for name in sorted(weights.keys()):
            # Inside the name and not at its start: releases of transformers prefix stored names differently.
            if not any(f"{projector}." in name for projector in projectors):
                digest.update(tensor_hash({name: weights.get_tensor(name)}).encode())


def settings_hash(folder: Path) -> str:
    """Return a SHA-256 of a checkpoint's configuration, processor, tokenizer and template files."""
    digest = hashlib.sha256()
    files = [*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.model")]
    for file in sorted(files):
        if file.name.endswith(".index.json"):  # which weights are in which file decides nothing
            continue
        digest.update(file.name.encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
