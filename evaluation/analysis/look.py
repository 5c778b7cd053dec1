"""What every method keeps of an image, of one encoding for all methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunetune.data_recipes import Sample
from prunetune.data_recipes.images import ImageOpener
from prunetune.evaluation.errors import TaskError
from prunetune.models import Arm
from prunetune.pruning.rewrite import Pruned
from prunetune.pruning.vision import NEWLINE, Vision

SIGNALS = {
    "cls_attention": "attention of [CLS], mean over heads",
    "received_attention": "attention that a token receives, mean over queries and heads",
}
"""Whose entropy is taken, the first that a model's vision tower offers: the adaptive study takes [CLS]'s."""


@dataclass(frozen=True)
class Looked:
    """An image, and what each method keeps of it.

    An image has several items where the model cuts it into crops; the first one shows it whole.

    Attributes:
        tokens: (L, D) what the LLM would be given without pruning.
        attention: for each item the signal (N,) as a distribution over its tokens; none if the tower offers none.
        there: for each item which of its tokens (N,) reach the LLM without pruning: a model may cut padding away.
        kept: for each method, by its label, and each item which of the tokens (N,) are kept and
            reach the LLM.
        features: for each method (K, D) what the LLM is given, merged tokens included.
        grid: rows and columns of the first item; None where its tokens form no grid.
    """

    tokens: Tensor
    attention: tuple[np.ndarray, ...]
    there: tuple[np.ndarray, ...]
    kept: Mapping[str, tuple[np.ndarray, ...]]
    features: Mapping[str, Tensor]
    grid: tuple[int, int] | None

    @property
    def count(self) -> int:
        """How many visual tokens the image has."""
        return sum(int(own.sum()) for own in self.there)

    def choices(self) -> Looked:
        """Return the same without features, which hold the device's memory as long as they are held."""
        return replace(self, tokens=torch.empty(0), features={})

    def kept_of_all(self, label: str) -> np.ndarray:
        """Return which of all tokens of the image a method keeps (count,)."""
        return np.concatenate([own[there] for own, there in zip(self.kept[label], self.there, strict=True)])


class Eye:
    """Looks at images with several methods of one model, whose vision side runs once for all of them.

    Args:
        arm: the model; what it prunes itself does not matter.
        arms: the methods by their labels, arms of the same model.
    """

    def __init__(self, arm: Arm, arms: Mapping[str, Arm]) -> None:
        self.arm = arm
        self.arms = dict(arms)
        offered = arm.pruned.family.signals(arm.model)
        self.signal = next((name for name in SIGNALS if name in offered), None)
        needs = {need for own in self.arms.values() for need in own.pruned.needs}
        self.needs = frozenset(needs | ({self.signal} if self.signal else set()))
        # A formatter adds the instruction where its arm's method reads it.
        self.reading = next((own for own in self.arms.values() if own.pruned.reads_text), arm)

    def batch(self, images: ImageOpener, samples: Sequence[Sample]) -> Batch:
        """Encode the images of some samples, one each.

        Raises:
            TaskError: if there is no image in it.
        """
        inputs = self.arm.place(self.reading.formatter(images).prompt_batch(samples))
        with torch.inference_mode():
            vision = self.arm.pruned.encode(inputs, self.needs)
        if set(vision) != {"image"}:
            raise TaskError("a sample without a single image can't be looked at; choose another benchmark")
        return Batch(self, inputs, vision)


@dataclass(frozen=True)
class Batch:
    """Encoded images.

    Attributes:
        eye: that looks at them.
        inputs: of the formatter, on the device.
        vision: the images with the signals of all methods.
    """

    eye: Eye
    inputs: dict[str, Any]
    vision: dict[str, Vision]

    def inputs_of(self, arm: Arm) -> dict[str, Any]:
        """Return the inputs for one arm."""
        inputs = dict(self.inputs)
        if not arm.pruned.reads_text:
            inputs.pop("instructions", None)
        return inputs

    def looked(self) -> list[Looked]:
        """Return what each method keeps of each image."""
        pruned = {}
        with torch.inference_mode():
            for label, arm in self.eye.arms.items():
                pruned[label] = arm.pruned.prepare(self.inputs_of(arm), vision=self.vision)
            return list(looked_at(self.vision["image"], pruned, self.eye.signal))


def looked_at(vision: Vision, pruned: Mapping[str, Pruned], signal: str | None) -> Iterator[Looked]:
    """Yield the image of every row of a batch.

    Args:
        vision: the images with the signal.
        pruned: what each method made of them, by its label.
        signal: whose distribution is taken; None takes none.
    """
    kept = {label: own.chosen["image"].kept_tokens().cpu().numpy() for label, own in pruned.items()}
    features = {label: own.inputs["mm_encoder_outputs"]["image"].pooler_output for label, own in pruned.items()}
    items = _items(vision)
    # Some families count every tile as an image: those of one row are the tiles of its image.
    tiles: dict[int, list[int]] = {}
    for image, row in enumerate(next(iter(pruned.values())).rows["image"]):
        tiles.setdefault(row, []).append(image)
    for row in sorted(tiles):
        images = tiles[row]
        there = np.zeros(vision.total, dtype=bool)
        for image in images:
            origin = vision.origin[image].cpu().numpy()
            there[origin[origin != NEWLINE]] = True
        own = [item for image in images for item in items[image]]
        attention = []
        if signal is not None:
            for group, item, _ in own:
                attention.append(distribution(vision.groups[group].finite(signal)[item].double().mean(dim=0)))
        yield Looked(
            tokens=torch.cat([vision.slots[image] for image in images]),
            attention=tuple(attention),
            there=tuple(there[numbers] for _, _, numbers in own),
            # A method may choose padding, which the model then cuts away: what counts is what reaches the LLM.
            kept={label: tuple((mask & there)[numbers] for _, _, numbers in own) for label, mask in kept.items()},
            features={label: torch.cat([of[image] for image in images]) for label, of in features.items()},
            grid=vision.groups[own[0][0]].grid,
        )


def _items(vision: Vision) -> list[list[tuple[int, int, np.ndarray]]]:
    """Return for each image its items: the group, the place in it, and the numbers (N,) of its tokens."""
    found: list[list[tuple[int, int, np.ndarray]]] = [[] for _ in vision.slots]
    for group, (numbers, owner) in enumerate(zip(vision.numbers(), vision.owner, strict=True)):
        for item, image in enumerate(owner):
            found[image].append((group, item, numbers[item].cpu().numpy()))
    return found


def distribution(weights: Tensor) -> np.ndarray:
    """Return weights (N,) divided by their sum, float64; equal ones where all are zero."""
    values = weights.cpu().numpy().astype(np.float64)
    total = values.sum()
    return values / total if total > 0 else np.full(len(values), 1 / len(values))
