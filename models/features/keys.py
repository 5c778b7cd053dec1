"""Which entry of a feature cache belongs to a sample: its image's and, for methods that read it, its question's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from PIL import Image

from prunetune.data_recipes import Sample
from prunetune.pruning.text import instruction_text

KEY_BYTES = 16
"""128 bits: of a billion entries no two have the same by chance."""


def key_of(sample: Sample, by_question: bool) -> bytes:
    """Return the key of a sample's image, and with ``by_question`` of the instruction that pruning reads."""
    text = str(sample.image)
    if by_question:
        text += "\0" + instruction_of(sample)
    return hashlib.sha256(text.encode()).digest()[:KEY_BYTES]


def instruction_of(sample: Sample) -> str:
    """Return what pruning may read of a sample."""
    return instruction_text([turn.question for turn in sample.turns])


def entries_of(samples: Iterable[Sample], by_question: bool) -> Iterator[tuple[bytes, Sample]]:
    """Yield each image, or image and question, once: its key and the first sample that has it, in their order."""
    seen = set()
    for sample in samples:
        if sample.image is None:
            continue
        key = key_of(sample, by_question)
        if key not in seen:
            seen.add(key)
            yield key, sample


class FingerprintingImages:
    """An opener that remembers size and fingerprint of what it opened, by its reference."""

    def __init__(self, images: Any) -> None:
        self.images = images
        self.seen: dict[str, tuple[tuple[int, int], bytes]] = {}

    def exists(self, reference: str) -> bool:
        """Return whether the image is there."""
        return bool(self.images.exists(reference))

    def open(self, reference: str, sample_id: str) -> Any:
        """Return the image."""
        opened = self.images.open(reference, sample_id)
        if isinstance(opened, Image.Image):
            self.seen[reference] = (opened.size, fingerprint(opened))
        return opened


def fingerprint(image: Image.Image) -> bytes:
    """Return 128 bits of a SHA-256 of an image's size and pixels: the same file behind another name has the same."""
    digest = hashlib.sha256(f"{image.size} {image.mode}".encode())
    digest.update(image.tobytes())
    return digest.digest()[:KEY_BYTES]
