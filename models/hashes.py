"""Hashes of tensors in memory; those of files are in :mod:`prunetune.models.stored`, and take no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from prunetune.models.stored import frozen_files_hash as frozen_files_hash
from prunetune.models.stored import settings_hash as settings_hash
from prunetune.pruning.text import TextReader


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


def text_tower_hash(reader: TextReader) -> str:
    """Return a SHA-256 of what a pruner reads of its text tower: weights, configuration and tokenizer.

    Of the weights as they are loaded, in float32: a hub id may hold pickles alone, and the file is not what is read.
    """
    clip: Any = reader.clip
    text = clip.config.text_config.to_dict()
    # Where it was read from and by whom decides nothing.
    for name in ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"):
        text.pop(name, None)
    tokenizer: Any = reader.tower_tokenizer
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    for name in ("truncation", "padding"):  # left there by whoever called it last
        vocabulary.pop(name, None)
    digest = hashlib.sha256(tensor_hash(clip.state_dict()).encode())
    digest.update(json.dumps([text, vocabulary], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def stored_text_tower_hash(tower: str, base: str | Path) -> str:
    """Return the hash of a text tower that is not loaded yet, for a base in a folder.

    Raises:
        PruningError: if it can't be loaded, or belongs to a vision tower of another width.
    """
    model: Any = SimpleNamespace(config=AutoConfig.from_pretrained(base))  # of the base its widths are enough
    return text_tower_hash(TextReader(model, None, tower))
