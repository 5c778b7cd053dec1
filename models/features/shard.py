"""One file of a feature cache: some images' features, and where each pruner and budget finds its own among them.

A safetensors file with these tensors, E images with R rows of features in all:

    keys (E, 16) uint8            which image, see :mod:`prunetune.models.features.keys`
    sizes (E, 2) int32            width and height in pixels
    fingerprints (E, 16) uint8    of the pixels
    lengths (E,) int32            placeholders
    rows (R, C)                   pre-projector features in the model's dtype, image after image
    offsets (E + 1,) int64        the first row of each image
    digests (E, 32) uint8         SHA-256 of each image's rows
    newline (D,)                  what stands in row ends, where there are any
    items (E, 3) int32            of how many items alike an image is, and their grid, see ``StoredImages``; where all
                                  tokens are a choice
    N.offsets (E + 1,) int64      of choice N: the first entry of each image in
    N.at, N.source int32          the slots that stay, and the row that stands in each; -1 is a row end
    N.reads_projector (1,) uint8  whether the choice was made by the projector's output
    N.note.NAME (E,) float64      what the method noted; NaN of images without
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from prunetune.models.errors import CheckpointError, FeatureError
from prunetune.models.features.kept import KeptImage
from prunetune.models.stored import Stored, stored_tensors
from prunetune.outputs import write_bytes
from prunetune.reading import one_line

_HEADER = "prunetune"
_NUMPY = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "F64": np.float64}


@dataclass(frozen=True)
class Entry:
    """One image, and what is stored of it.

    Attributes:
        key: which it is.
        size: width and height in pixels.
        fingerprint: of its pixels.
        kept: its features and choices.
    """

    key: bytes
    size: tuple[int, int]
    fingerprint: bytes
    kept: KeptImage


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"features-{number:05d}.safetensors"


def entry_bytes(entries: Sequence[Entry]) -> int:
    """Return how many bytes a shard of these images takes."""
    return sum(tensor.nbytes for tensor in _tensors(entries, None, [False] * len(entries[0].kept.choices)).values())


def write_shard(
    path: Path,
    entries: Sequence[Entry],
    newline: Tensor | None,
    reads_projector: Sequence[bool],
    made_with: str,
    all_tokens: bool = False,
) -> None:
    """Write a shard, whole or not at all.

    Args:
        path: its file.
        entries: its images.
        newline: (D,) what stands in row ends; None if there are none.
        reads_projector: for each choice whether it was made by the projector's output.
        made_with: the seal of what the cache is made with; another cache's shard is told by it.
        all_tokens: whether a choice is all tokens, from which methods may choose anew.

    Raises:
        OutputError: if it can't be written.
    """
    tensors = _tensors(entries, newline, reads_projector)
    if all_tokens:
        items = [(entry.kept.items, *entry.kept.grid) for entry in entries]
        tensors["items"] = torch.tensor(items, dtype=torch.int32)
    head = _head_hash([_stored(name, tensor) for name, tensor in sorted(tensors.items())])
    # One value: the order of several differs from run to run, and so would the file.
    write_bytes(path, save(tensors, {_HEADER: json.dumps({"head": head, "made_with": made_with})}))


def _tensors(entries: Sequence[Entry], newline: Tensor | None, reads_projector: Sequence[bool]) -> dict[str, Tensor]:
    """Return the tensors of a shard."""
    kept = [entry.kept for entry in entries]
    tensors = {
        "keys": _bytes([entry.key for entry in entries]),
        "sizes": torch.tensor([entry.size for entry in entries], dtype=torch.int32),
        "fingerprints": _bytes([entry.fingerprint for entry in entries]),
        "lengths": torch.tensor([image.length for image in kept], dtype=torch.int32),
        "rows": torch.cat([image.rows for image in kept]).contiguous(),
        "offsets": _offsets([len(image.rows) for image in kept]),
        "digests": _bytes([hashlib.sha256(_raw(image.rows)).digest() for image in kept]),
    }
    if newline is not None:
        tensors["newline"] = newline.contiguous()
    for number, by_projector in enumerate(reads_projector):
        choices = [image.choices[number] for image in kept]
        tensors[f"{number}.offsets"] = _offsets([len(choice.at) for choice in choices])
        tensors[f"{number}.at"] = torch.cat([choice.at for choice in choices]).int()
        tensors[f"{number}.source"] = torch.cat([choice.source for choice in choices]).int()
        tensors[f"{number}.reads_projector"] = torch.tensor([by_projector], dtype=torch.uint8)
        for name in sorted({name for choice in choices for name in choice.notes}):
            values = [choice.notes.get(name, math.nan) for choice in choices]
            tensors[f"{number}.note.{name}"] = torch.tensor(values, dtype=torch.float64)
    return tensors


class Shard:
    """A shard that is read through a memory map: of the features nothing is in memory but what is asked for.

    Args:
        path: its file.
        head: the hash that the index holds of it; None leaves that unchecked.

    Raises:
        FeatureError: if it is missing, cut short or changed.
    """

    def __init__(self, path: Path, head: str | None = None) -> None:
        self.path = path
        if not path.is_file():
            raise FeatureError(f"{path} is missing; `prunetune cache` with the same configuration makes it anew")
        try:
            found = stored_tensors(path)
        except CheckpointError as error:
            raise FeatureError(f"{error}; {_ANEW}") from error
        self._tensors = {tensor.name: tensor for tensor in found}
        self.made_with, stored = _header(path)
        self.head = _head_hash(found)
        if stored != self.head or head not in (None, self.head):
            raise FeatureError(f"{path} is damaged: its index lists were changed after they were written; {_ANEW}")

    def array(self, name: str) -> Any:
        """Return a tensor of the head as a NumPy array that can't be written to."""
        tensor = self._tensors[name]
        return np.frombuffer(tensor.data, dtype=_NUMPY[tensor.dtype]).reshape(tensor.shape)

    @cached_property
    def keys(self) -> list[bytes]:
        """The key of each image."""
        return [bytes(key) for key in self.array("keys")]

    @cached_property
    def rows(self) -> Any:
        """All features as bytes, (R, C * bytes per number)."""
        stored = self._tensors["rows"]
        return np.frombuffer(stored.data, dtype=np.uint8).reshape(stored.shape[0], -1)

    @property
    def dtype(self) -> torch.dtype:
        """The features' dtype."""
        return _TORCH[self._tensors["rows"].dtype]

    def features(self, number: int) -> Any:
        """Return the features of an image as bytes (R, C * bytes per number); they are compared with their digest.

        Raises:
            FeatureError: if they were changed.
        """
        offsets = self.array("offsets")
        own = self.rows[offsets[number] : offsets[number + 1]]
        if hashlib.sha256(own).digest() != bytes(self.array("digests")[number]):
            raise FeatureError(f"{self.path} is damaged: features of image {number} were changed; {_ANEW}")
        return own

    def kept(self, number: int, choice: int) -> tuple[Any, Any]:
        """Return the slots of an image that a choice keeps, and the row that stands in each, -1 for a row end."""
        first, last = self.array(f"{choice}.offsets")[number : number + 2]
        return self.array(f"{choice}.at")[first:last], self.array(f"{choice}.source")[first:last]

    def notes(self, number: int, choice: int) -> dict[str, float]:
        """Return what the method noted of an image by name."""
        found = {}
        start = f"{choice}.note."
        for name in self._tensors:
            if name.startswith(start):
                value = float(self.array(name)[number])
                if not math.isnan(value):
                    found[name.removeprefix(start)] = value
        return found

    def items(self, number: int) -> tuple[int, int, int]:
        """Return of how many items alike an image is, and their rows and columns; zeros where that is not known."""
        if "items" not in self._tensors:
            return (0, 0, 0)
        count, rows, columns = self.array("items")[number].tolist()
        return count, rows, columns

    @property
    def can_choose_anew(self) -> bool:
        """Whether a method may choose anew from every image of which all tokens are stored."""
        return "items" in self._tensors and bool((self.array("items")[:, 0] > 0).all())

    def reads_projector(self, choice: int) -> bool:
        """Return whether a choice was made by the projector's output."""
        return bool(self.array(f"{choice}.reads_projector")[0])

    @property
    def newline(self) -> Tensor | None:
        """What stands in row ends, (D,)."""
        stored = self._tensors.get("newline")
        if stored is None:
            return None
        return torch.frombuffer(bytearray(stored.data), dtype=_TORCH[stored.dtype])

    def check_all(self) -> None:
        """Compare the features of every image with their digest; raises FeatureError."""
        for number in range(len(self.keys)):
            self.features(number)


_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that a model runs in, as safetensors spells them."""
_SPELLED = {dtype: name for name, dtype in _TORCH.items()}
_SPELLED |= {torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64", torch.float64: "F64"}
_ANEW = "`prunetune cache` with the same configuration finds what is damaged and makes it anew"


def _header(path: Path) -> tuple[str, str]:
    """Return what a shard was made with, and the hash of its head."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            values = json.loads(json.loads(stream.read(length))["__metadata__"][_HEADER])
            return str(values["made_with"]), str(values["head"])
        except (ValueError, KeyError, TypeError) as error:
            raise FeatureError(f"{path} is no shard of a feature cache: {one_line(error)}; {_ANEW}") from error


def _head_hash(tensors: Sequence[Stored]) -> str:
    """Return a SHA-256 of all tensors but the features, which have digests of their own among these."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor.name == "rows":
            digest.update(f"rows {tensor.dtype} {tensor.shape}".encode())
        else:
            tensor.hash_into(digest)
    return digest.hexdigest()


def _stored(name: str, tensor: Tensor) -> Stored:
    return Stored(name, _SPELLED[tensor.dtype], tuple(tensor.shape), memoryview(_raw(tensor)))


def _raw(tensor: Tensor) -> Any:
    """Return a tensor's bytes as a NumPy array."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _bytes(values: Sequence[bytes]) -> Tensor:
    """Return equally long byte strings as (E, n) uint8."""
    return torch.frombuffer(bytearray(b"".join(values)), dtype=torch.uint8).reshape(len(values), -1)


def _offsets(counts: Sequence[int]) -> Tensor:
    """Return where each begins and the last ends: ``[2, 3]`` gives ``[0, 2, 5]``."""
    return torch.tensor([0, *counts], dtype=torch.int64).cumsum(dim=0)
