"""Batches without pixels: a formatter whose images come from a feature cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prunetune.data_recipes import Formatter, Sample
from prunetune.data_recipes.images import Counted
from prunetune.models.arm import Arm
from prunetune.models.features.store import FeatureStore


class KnownImages:
    """Opens no file: of an image whose features are stored, size and number of placeholders are known."""

    def __init__(self) -> None:
        self.known: dict[str, Counted] = {}

    def exists(self, reference: str) -> bool:
        """Return true: what has no features was told of before."""
        return True

    def open(self, reference: str, sample_id: str) -> Counted:
        """Return what is known of an image of the batch."""
        return self.known[reference]


class FeatureFormatter:
    """Turns samples into batches with ``stored`` in place of pixels, for `PrunedModel` and what it is attached to.

    Args:
        store: the features, checked for the arm.
        arm: the model.
        max_length: longest sequence in tokens, None for no limit.
        within: puts before an image's name what the features were made with it, such as its benchmark's.
    """

    def __init__(
        self,
        store: FeatureStore,
        arm: Arm,
        max_length: int | None = None,
        within: Callable[[Sample], Sample] | None = None,
    ) -> None:
        self.store = store
        self.within = within
        self.images = KnownImages()
        self.formatter: Formatter = arm.formatter(self.images, max_length)
        # What else describes pixels stays, such as their grid: positions are made of it.
        self._pixels = set(arm.pruned.family.pixels.values())

    def training_batch(self, samples: Sequence[Sample], cells: Sequence[int] | None = None) -> dict[str, Any]:
        """Return what ``Formatter.training_batch`` does, without pixels.

        Args:
            samples: of the batch.
            cells: the number of each sample's setting; None is the arm's own pruning.
        """
        return self._made(self.formatter.training_batch, samples, cells)

    def prompt_batch(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return what ``Formatter.prompt_batch`` does, without pixels."""
        return self._made(self.formatter.prompt_batch, samples)

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch as it is: there are no pixels to make numbers of."""
        return batch

    def _made(
        self,
        make: Callable[[Sequence[Sample]], dict[str, Any]],
        samples: Sequence[Sample],
        cells: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        if self.within is not None:
            samples = [self.within(sample) for sample in samples]
        self.images.known = {}  # of this batch alone, so that a worker does not gather those of all images
        for sample in samples:
            if sample.image is not None:
                known = Counted(self.store.size(sample), self.store.placeholders(sample))
                self.images.known[str(sample.image)] = known
        batch = make(samples)
        kept = {name: value for name, value in batch.items() if name not in self._pixels}
        return {**kept, "stored": self.store.batch(samples, cells=cells)}
