"""Laying the samples of an update out over devices and micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch.utils.data import Sampler

from prunetune.configs import ConfigError
from prunetune.train.elastic import Draws

Lengths = Sequence[int] | Mapping[int, int]
"""Tokens after pruning, by the sample's number."""


@dataclass(frozen=True)
class MicroBatch:
    """Samples that a device takes at once.

    Attributes:
        indices: the samples' numbers.
        counts: whether they are trained on; a device with nothing left to do takes a sample for nothing, since all
            devices run the model equally often.
        cells: the number of each sample's setting, in a run over several.
    """

    indices: tuple[int, ...]
    counts: bool = True
    cells: tuple[int, ...] | None = None


def of_equal_number(samples: Sequence[int], size: int, ranks: int) -> list[list[MicroBatch]]:
    """Return for each rank its micro-batches of at most ``size`` samples, all ranks as many.

    Seven samples in twos on two ranks are ``[[0, 1], [4, 5]]`` and ``[[2, 3], [6]]``.
    """
    parts = -(-len(samples) // (size * ranks)) * ranks
    return _dealt(_even_parts(samples, parts), samples, ranks)


def by_budget(
    samples: Sequence[int], lengths: Lengths, budget: int, ranks: int, padded: bool
) -> list[list[MicroBatch]]:
    """Return for each rank its micro-batches of at most ``budget`` tokens, all ranks as many, as even as they get.

    Args:
        samples: the numbers of an update's samples.
        lengths: tokens of every sample of the data, after pruning.
        budget: most tokens of a micro-batch.
        ranks: how many devices.
        padded: whether the samples of a micro-batch are padded to its longest, or stand behind one another.

    Raises:
        ConfigError: if one sample alone has more tokens.
    """
    check_budget(max(lengths[index] for index in samples), budget)
    ordered = sorted(samples, key=lambda index: (-lengths[index], index))
    parts = _padded_parts(ordered, lengths, budget) if padded else _packed_parts(ordered, lengths, budget, ranks)
    while len(parts) % ranks:
        _split_largest(parts)
    # The heaviest first, dealt to and fro, so that ranks wait little for one another.
    parts.sort(key=lambda part: -_tokens(part, lengths, padded))
    dealt: list[list[int]] = []
    for first in range(0, len(parts), ranks):
        row = parts[first : first + ranks]
        dealt += row if first // ranks % 2 == 0 else row[::-1]
    return _dealt(dealt, samples, ranks)


def check_budget(longest: int, budget: int) -> None:
    """Raise ConfigError if the longest sample has more tokens than a micro-batch may."""
    if longest > budget:
        raise ConfigError(
            f"engine.token_budget {budget} is less than one sample: the longest has {longest} tokens after pruning; "
            f"raise it to at least {longest}, or lower train.max_length"
        )


def _tokens(part: Sequence[int], lengths: Lengths, padded: bool) -> int:
    own = [lengths[index] for index in part]
    return len(own) * max(own, default=0) if padded else sum(own)


def _packed_parts(ordered: Sequence[int], lengths: Lengths, budget: int, ranks: int) -> list[list[int]]:
    """Return as few parts as hold everything: each sample, the longest first, goes where there is most room."""
    total = sum(lengths[index] for index in ordered)
    number = -(-total // (budget * ranks)) * ranks
    while True:
        parts: list[list[int]] = [[] for _ in range(number)]
        filled = [0] * number
        for index in ordered:
            emptiest = filled.index(min(filled))
            parts[emptiest].append(index)
            filled[emptiest] += lengths[index]
        if max(filled) <= budget:
            return parts
        number += ranks


def _padded_parts(ordered: Sequence[int], lengths: Lengths, budget: int) -> list[list[int]]:
    """Return stretches of the samples, longest first, of which none takes more than the budget with its padding."""
    parts: list[list[int]] = []
    for index in ordered:
        if not parts or (len(parts[-1]) + 1) * lengths[parts[-1][0]] > budget:
            parts.append([])
        parts[-1].append(index)
    return parts


def _split_largest(parts: list[list[int]]) -> None:
    """Make two parts of the one with most samples; the second may stay empty."""
    largest = max(range(len(parts)), key=lambda number: len(parts[number]))
    part = parts[largest]
    half = (len(part) + 1) // 2
    parts[largest] = part[:half]
    parts.append(part[half:])


def _even_parts(samples: Sequence[int], number: int) -> list[list[int]]:
    """Return contiguous parts whose sizes differ by one at most; there may be empty ones."""
    small, larger = divmod(len(samples), number)
    parts, first = [], 0
    for part in range(number):
        size = small + (part < larger)
        parts.append(list(samples[first : first + size]))
        first += size
    return parts


def _dealt(parts: Sequence[Sequence[int]], samples: Sequence[int], ranks: int) -> list[list[MicroBatch]]:
    """Return each rank's share of the parts; an empty one becomes a sample that does not count."""
    shares: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    for number, part in enumerate(parts):
        batch = MicroBatch(tuple(part)) if part else MicroBatch((samples[0],), counts=False)
        shares[number % ranks].append(batch)
    return shares


def loss_weights(counts: Sequence[int], loss: str) -> tuple[list[float], int]:
    """Return what each micro-batch's summed loss is multiplied by, and what their sum over all ranks is divided by.

    All supervised tokens weigh alike with "token_mean", and with "micro_batch_mean" all micro-batches that have any.

    Args:
        counts: supervised tokens of each micro-batch.
        loss: "token_mean" or "micro_batch_mean".
    """
    if loss == "micro_batch_mean":
        return [1 / count if count else 0.0 for count in counts], sum(count > 0 for count in counts)
    return [float(count > 0) for count in counts], sum(counts)


class Order(Protocol):
    """Every sample once, in the order of an epoch.

    Attributes:
        epoch: says which epoch begins.
    """

    epoch: Callable[[], int]

    def __iter__(self) -> Iterator[int]:
        """Yield the samples' numbers."""
        ...

    def __len__(self) -> int:
        """Return how many samples there are."""
        ...


@dataclass(frozen=True)
class Share:
    """What of an update's samples one rank takes.

    Attributes:
        rank: this one.
        ranks: of how many.
        size: samples of a micro-batch, where no budget is set.
        accumulation: micro-batches of a rank and an update, where no budget is set.
        budget: tokens of a micro-batch; None goes by ``size``.
        padded: whether samples are padded to their longest.
    """

    rank: int
    ranks: int
    size: int
    accumulation: int
    budget: int | None = None
    padded: bool = True

    @property
    def group(self) -> int:
        """Samples of an update over all ranks."""
        return self.size * self.accumulation * self.ranks

    def of(self, samples: Sequence[int], lengths: Lengths | None) -> list[MicroBatch]:
        """Return this rank's micro-batches of an update's samples."""
        if self.budget is None or lengths is None:
            return of_equal_number(samples, self.size, self.ranks)[self.rank]
        return by_budget(samples, lengths, self.budget, self.ranks, self.padded)[self.rank]


class StepSampler(Sampler[list[MicroBatch]]):
    """Yields an update's micro-batches of this rank, update by update, through an epoch.

    Args:
        order: of all samples in this epoch.
        share: what this rank takes.
        lengths: for each setting tokens of every sample after pruning, one setting in a run that draws none; read with
            a budget only.
        draws: says which setting each sample of an update has, in a run over several.
    """

    def __init__(
        self, order: Order, share: Share, lengths: Sequence[Sequence[int]] | None = None, draws: Draws | None = None
    ) -> None:
        self.order, self.share, self.lengths, self.draws = order, share, lengths, draws

    def __len__(self) -> int:
        return -(-len(self.order) // self.share.group)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        epoch, ordered = self.order.epoch(), list(self.order)
        for update in range(len(self)):
            first = update * self.share.group
            samples = ordered[first : first + self.share.group]
            if self.draws is None:
                yield self.share.of(samples, None if self.lengths is None else self.lengths[0])
                continue
            cells = dict(zip(samples, self.draws.of(epoch, update, len(samples)), strict=True))
            lengths = None
            if self.lengths is not None:
                lengths = {index: self.lengths[cell][index] for index, cell in cells.items()}
            batches = self.share.of(samples, lengths)
            yield [replace(batch, cells=tuple(cells[index] for index in batch.indices)) for batch in batches]
