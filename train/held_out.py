"""The held-out slice of a recipe: which samples it has, and the loss on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunetune.data_recipes import DataError, Formatter, RecipeData
from prunetune.data_recipes.content import column, content_hash
from prunetune.data_recipes.formatting import supervised
from prunetune.data_recipes.recipe import counts_of, whole_images
from prunetune.models.features import FeatureFormatter
from prunetune.models.ranks import Ranks

SummedLoss = Callable[[Mapping[str, Any]], Tensor]
"""Returns the loss of a formatter's batch, summed over its units, such as supervised tokens: a number on any device, or
one for each kind of unit."""
Units = Callable[[Mapping[str, Any]], Sequence[int]]
"""Returns how many of each kind of unit a formatter's batch has."""


def supervised_tokens(batch: Mapping[str, Any]) -> list[int]:
    """Return how many supervised tokens a batch has, the one unit of the cross entropy."""
    return [int(supervised(batch["labels"]).sum())]


def split(data: RecipeData, number: int, seed: int) -> tuple[RecipeData, RecipeData]:
    """Return what to train on and what to measure on, whole images at a time.

    A recipe that holds samples out itself is trained on as it is, and ``number`` of what it holds out are measured on.
    Of any other, ``number`` samples are drawn and taken from what is trained on.

    Args:
        data: the recipe's.
        number: samples to measure on, at least; the last image is taken whole.
        seed: of the draw.

    Raises:
        DataError: if nothing would be left to train on, or the recipe trains on an image that it holds out.
    """
    if data.held_out is not None and len(data.held_out):
        _check_apart(data)
        chosen = whole_images(column(data.held_out, "image"), number, seed)
        return data, _of(data, data.held_out, chosen)
    chosen = whole_images(column(data.rows, "image"), number, seed)
    if chosen.all():
        raise DataError(
            f"train.held_out {number} takes all {len(data)} samples of recipe {data.name!r}, with the others of their "
            "images, and none is left to train on; lower it"
        )
    held = _of(data, data.rows, chosen)
    rest = replace(_of(data, data.rows, ~chosen), held_out=held.rows, split_from=data.content_hash)
    return rest, held


def _of(data: RecipeData, rows: Any, which: np.ndarray) -> RecipeData:
    chosen = rows if which.all() else rows.select(np.flatnonzero(which))
    return replace(data, rows=chosen, content_hash=content_hash(chosen), counts=counts_of(chosen), held_out=None)


def _check_apart(data: RecipeData) -> None:
    """Check that no image is trained on and measured on; raises DataError."""
    assert data.held_out is not None
    trained = set(data.rows["image"])
    both = sorted({image for image in data.held_out["image"] if image is not None and image in trained})
    if both:
        raise DataError(
            f"recipe {data.name!r} holds out {len(both)} images that it also trains on, such as {both[0]}; a held-out "
            "loss on them says nothing: take them out of one of the two"
        )


@dataclass(frozen=True)
class HeldOutLoss:
    """The mean loss over the units of held-out samples, supervised tokens; calling it is for all ranks at once.

    What a batch holds does not depend on the number of ranks, and the batches' sums are added in one order, exactly:
    the loss is the same over any number of ranks.

    Attributes:
        data: what is measured on.
        formatter: turns samples into batches.
        summed_loss: runs the model as training does.
        ranks: this process among the others.
        size: samples of a batch.
        units: counts them; of several kinds the means are added.
    """

    data: RecipeData
    formatter: Formatter | FeatureFormatter
    summed_loss: SummedLoss
    ranks: Ranks
    size: int
    units: Units = supervised_tokens

    def __call__(self, model: torch.nn.Module, device: torch.device) -> float:
        """Return the loss, the same number on every rank.

        Args:
            model: is set to evaluation, and back to what it was.
            device: of the sums, which is one that ranks can exchange.

        Raises:
            DataError: if no held-out sample has a unit, such as a supervised token.
        """
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                sums, units = self._sums()
        finally:
            model.train(training)
        told = torch.tensor([sums, units], dtype=torch.float64, device=device)  # (2, batches, kinds)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(told)  # every number is one rank's own, and 0 on the others
        if not bool(told[1].any()):
            raise DataError(
                f"none of the {len(self.data)} held-out samples has an answer token left after train.max_length; "
                "raise it"
            )
        loss = 0.0
        for kind in range(told.shape[2]):
            sums, units = told[:, :, kind].tolist()
            loss += math.fsum(sums) / sum(units) if sum(units) else 0.0
        return loss

    def _sums(self) -> tuple[list[list[float]], list[list[float]]]:
        """Return summed loss and units of each batch, of every kind; 0 for those of other ranks."""
        firsts = range(0, len(self.data), self.size)
        sums: list[list[float]] = [[] for _ in firsts]
        units: list[list[float]] = [[] for _ in firsts]
        # As often on every rank: under ZeRO-3 each of them waits for the others' weights.
        for turn in range(math.ceil(len(firsts) / self.ranks.world)):
            number = turn * self.ranks.world + self.ranks.rank
            first = firsts[number] if number < len(firsts) else 0
            samples = [self.data[index] for index in range(first, min(first + self.size, len(self.data)))]
            batch = self.formatter.training_batch(samples)
            counts = list(self.units(batch))
            loss = [0.0] * len(counts)
            if any(counts) or self.ranks.world > 1:
                loss = self.summed_loss(batch).reshape(-1).tolist()
            if number < len(firsts):
                # A kind that the batch has none of adds nothing, whatever was made of nothing.
                sums[number] = [own if count else 0.0 for own, count in zip(loss, counts, strict=True)]
                units[number] = [float(count) for count in counts]
        kinds = len(counts)
        return [own or [0.0] * kinds for own in sums], [own or [0.0] * kinds for own in units]
