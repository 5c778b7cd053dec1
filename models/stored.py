"""Hashes of weights as their files hold them, whatever dtype they are loaded in; nothing here needs torch."""

from __future__ import annotations

import hashlib
import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from prunetune.models.errors import CheckpointError
from prunetune.reading import one_line

PREFIX = "base_model.model."
"""What PEFT puts before the names of an adapter's tensors."""
# As torch prints them: the same hash as of the tensors when they are loaded.
_TORCH = {
    "F64": "torch.float64",
    "F32": "torch.float32",
    "F16": "torch.float16",
    "BF16": "torch.bfloat16",
    "F8_E4M3": "torch.float8_e4m3fn",
    "F8_E5M2": "torch.float8_e5m2",
    "I64": "torch.int64",
    "I32": "torch.int32",
    "I16": "torch.int16",
    "I8": "torch.int8",
    "U64": "torch.uint64",
    "U32": "torch.uint32",
    "U16": "torch.uint16",
    "U8": "torch.uint8",
    "BOOL": "torch.bool",
    "C64": "torch.complex64",
}
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def hash_into(self, digest: Any, name: str | None = None) -> None:
        """Add name, dtype, shape and bytes, as :func:`~prunetune.models.hashes.tensor_hash` does."""
        kind = _TORCH.get(self.dtype, self.dtype)
        digest.update(f"{self.name if name is None else name} {kind} {self.shape}".encode())
        digest.update(self.data)

    def finite(self) -> bool:
        """Return whether no value is NaN or infinite."""
        if self.dtype == "BF16":  # which NumPy has not: all bits of the exponent are set
            bits = np.frombuffer(self.data, dtype="<u2")
            return not bool(((bits & 0x7F80) == 0x7F80).any())
        if self.dtype not in _NUMPY:
            return True
        return bool(np.isfinite(np.frombuffer(self.data, dtype=_NUMPY[self.dtype])).all())


@dataclass(frozen=True)
class BaseHashes:
    """What identifies a base, under the names of records and manifests.

    Attributes:
        frozen_hash: SHA-256 of all stored weights but the projector's.
        original_projector_hash: SHA-256 of the projector's stored weights.
        projectors: modules that the projector is made of, by which the two are told apart.
    """

    frozen_hash: str
    original_projector_hash: str
    projectors: tuple[str, ...]

    def record(self) -> dict[str, str | list[str]]:
        """Return the JSON values."""
        return {
            "frozen_hash": self.frozen_hash,
            "original_projector_hash": self.original_projector_hash,
            "projectors": list(self.projectors),
        }


def base_hashes(folder: Path, projectors: tuple[str, ...]) -> BaseHashes:
    """Return the hashes of a checkpoint's stored weights; its files are read once.

    Raises:
        CheckpointError: if the folder has no safetensors, or one that can't be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} holds no .safetensors weights; convert the checkpoint with save_pretrained first"
        )
    frozen, original = hashlib.sha256(), hashlib.sha256()
    for file in files:
        for tensor in stored_tensors(file):
            own = hashlib.sha256()
            tensor.hash_into(own)
            # Inside the name and not at its start: releases of transformers prefix stored names differently.
            is_projector = any(f"{projector}." in tensor.name for projector in projectors)
            (original if is_projector else frozen).update(own.hexdigest().encode())
    return BaseHashes(frozen.hexdigest(), original.hexdigest(), tuple(projectors))


def frozen_files_hash(folder: Path, projectors: tuple[str, ...]) -> str:
    """Return a SHA-256 of all stored weights but the projector's: the same for every dtype they are loaded in.

    It says which base a projector belongs to: records and manifests hold it as ``frozen_hash``. That training changed
    no frozen weight is another hash, :func:`prunetune.train.trainer.frozen_tensors_hash`, of tensors in memory in the
    run's dtype; it is compared within a run and never stored.

    Raises:
        CheckpointError: if the folder has no safetensors.
    """
    return base_hashes(folder, projectors).frozen_hash


TENSORS = "adapter_model.safetensors"
"""The file of an adapter's tensors, as PEFT calls it."""


def stored_projector_hash(file: Path) -> str:
    """Return the hash of an adapter's tensors as its file holds them: ``projector_hash`` of its record.

    Raises:
        CheckpointError: if the file can't be read.
    """
    digest = hashlib.sha256()
    by_name = {tensor.name.removeprefix(PREFIX): tensor for tensor in stored_tensors(file)}
    for name in sorted(by_name):
        by_name[name].hash_into(digest, name)
    return digest.hexdigest()


def not_finite(file: Path) -> list[str]:
    """Return the names of a file's tensors that hold NaN or infinity; raises CheckpointError if it can't be read."""
    return [tensor.name.removeprefix(PREFIX) for tensor in stored_tensors(file) if not tensor.finite()]


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


def stored_tensors(file: Path) -> list[Stored]:
    """Return the tensors of a safetensors file in name order; their bytes are read when they are used.

    Raises:
        CheckpointError: if it can't be read.
    """
    try:
        with safe_open(file, framework="np"):  # checks the header, so that nothing below reads beyond a tensor
            pass
    # safetensors raises an error of its own Rust side besides OSError.
    except Exception as error:
        told = one_line(error)
        raise CheckpointError(f"{file} can't be read: {told}; it was cut short or is no safetensors file") from error
    with file.open("rb") as stream:
        # Mapped: a checkpoint need not fit the memory. It is unmapped with the last of its tensors.
        whole = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(bytes(whole[8:start]))
    tensors = []
    for name in sorted(header):
        if name != "__metadata__":
            begin, end = header[name]["data_offsets"]
            data = whole[start + begin : start + end]
            tensors.append(Stored(name, header[name]["dtype"], tuple(header[name]["shape"]), data))
    return tensors
