"""The order of training samples: shuffled, or grouped so that a batch holds samples of one kind and length."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence

from torch.utils.data import Sampler

from prunetune.configs import TrainConfig
from prunetune.data_recipes import RecipeData
from prunetune.data_recipes.videos import VIDEO

MEGABATCH = 50
"""Batches that are sorted by length together: more make even batches, fewer keep the order random."""
IMAGE_WORDS = 576
"""What an image counts in words; only the order matters, and every image has as many tokens."""


def samples_per_step(train: TrainConfig, ranks: int) -> int:
    """Return the samples of one optimizer step over all ranks."""
    return train.batch_size * train.accumulation * ranks


def steps_in_total(train: TrainConfig, samples: int, ranks: int) -> int:
    """Return the number of optimizer steps of a whole run."""
    if train.max_steps >= 0:
        return train.max_steps
    # Nothing is left out of an epoch, so its last update may be smaller.
    return max(1, math.ceil(train.epochs * math.ceil(samples / samples_per_step(train, ranks))))


def approximate_lengths(data: RecipeData) -> list[int]:
    """Return the words of every sample's conversation, images counted in, without tokenizing anything."""
    lengths = []
    for turns, image in zip(data.rows["turns"], data.rows["image"], strict=True):
        words = 0 if image is None else IMAGE_WORDS
        for turn in turns:
            words += len(f"{turn['question']} {turn['answer']}".split())
        lengths.append(words)
    return lengths


class ShuffledSampler(Sampler[int]):
    """Every sample once per epoch in random order, which depends on seed and epoch alone.

    Args:
        number: of samples.
        seed: of the order.

    Attributes:
        epoch: says which epoch begins, as of :class:`GroupedSampler`.
    """

    def __init__(self, number: int, seed: int) -> None:
        self.number, self.seed = number, seed
        self.epoch: Callable[[], int] = lambda: 0

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.number))
        random.Random(f"{self.seed} {self.epoch()}").shuffle(order)
        return iter(order)


class GroupedSampler(Sampler[int]):
    """Every sample once per epoch, batches of similar length next to each other, batches in random order.

    With ``modality`` a batch over all ranks holds images, videos or text only, but for the last of each; so no rank
    waits for another's images. The order depends on seed and epoch alone, which is what resuming needs.

    Args:
        lengths: of every sample.
        group: samples per step over all ranks.
        seed: of the order.
        modality: what each sample is about, any number per kind; None mixes all.

    Attributes:
        epoch: says which epoch begins. It is asked and not told, because data loaders count from 0 after resuming.
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int, modality: Sequence[int] | None = None) -> None:
        self.lengths, self.group, self.seed, self.modality = lengths, group, seed, modality
        self.epoch: Callable[[], int] = lambda: 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"{self.seed} {self.epoch()}")
        whole: list[list[int]] = []
        rest: list[int] = []
        for indices in self._kinds():
            for batch in self._batches(indices, chance):
                if len(batch) == self.group:
                    whole.append(batch)
                else:
                    rest += batch
        # Batches and not samples are shuffled now, so that no batch mixes lengths again.
        chance.shuffle(whole)
        for batch in whole:
            yield from batch
        yield from rest  # at the end, so that it shifts no other batch

    def _kinds(self) -> list[list[int]]:
        """Return the samples of each kind, or all of them as one kind."""
        if self.modality is None:
            return [list(range(len(self.lengths)))]
        kinds: dict[int, list[int]] = {kind: [] for kind in sorted(set(self.modality), reverse=True)}
        for index, kind in enumerate(self.modality):
            kinds[kind].append(index)
        return list(kinds.values())

    def _batches(self, indices: list[int], chance: random.Random) -> Iterator[list[int]]:
        chance.shuffle(indices)
        # Sorted within a stretch only: sorted as a whole, the same samples would share a batch in every epoch.
        size = self.group * MEGABATCH
        for start in range(0, len(indices), size):
            ordered = sorted(indices[start : start + size], key=lambda n: -self.lengths[n])
            for first in range(0, len(ordered), self.group):
                yield ordered[first : first + self.group]


def _kind(image: str | None) -> int:
    """Return 2 for a sample with an image, 1 with a video, and 0 for text alone."""
    if image is None:
        return 0
    return 1 if image.startswith(VIDEO) else 2


def train_sampler(data: RecipeData, sampling: str, group: int, seed: int) -> ShuffledSampler | GroupedSampler:
    """Return the order of samples of a configuration, of which ``group`` make an update."""
    if sampling == "shuffled":
        return ShuffledSampler(len(data), seed)
    modality = None
    if sampling == "modality_length":
        modality = [_kind(image) for image in data.rows["image"]]
    return GroupedSampler(approximate_lengths(data), group, seed, modality)
