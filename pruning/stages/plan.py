"""The plan of one forward: which columns of the prompt are left behind each boundary, decided while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from prunetune.pruning.errors import PruningError
from prunetune.pruning.ops.precision import exact_float32
from prunetune.pruning.sequence import IGNORE_INDEX
from prunetune.pruning.stages.base import Choice, Merged
from prunetune.pruning.stages.schedule import Counts, Schedule

PLAN = "prunetune_stages"
"""The keyword argument that hands a plan to its forward, and the attribute of a cache that keeps it."""


@dataclass(frozen=True)
class Segment:
    """The sequence behind a boundary: B rows of n slots, as many as the longest row needs.

    Shorter rows are filled up with slots of what was dropped, or of padding, which nothing sees.

    Attributes:
        take: (B, n) the slot of the segment before that each is; those beyond its end are merged tokens.
        mixing: (B, M, n before) what merged tokens are made of.
        columns: (B, n) the column of the prompt behind each slot; a merged token has that of its centre.
        shown: (B, n) which slots are neither padding nor filler.
        visual: (B, n) which are visual tokens.
        merged: (B, n) which were merged, here or before; None if none were.
        filler: (B, n) which are filler; None if there is none.
        dense: whether slots are numbered anew.
        made: masks and rotations that were cut for it, by those they were cut from.
    """

    take: Int[Tensor, "B n"]
    mixing: Float[Tensor, "B M m"] | None
    columns: Int[Tensor, "B n"]
    shown: Bool[Tensor, "B n"]
    visual: Bool[Tensor, "B n"]
    merged: Bool[Tensor, "B n"] | None
    filler: Bool[Tensor, "B n"] | None
    dense: bool
    made: dict[tuple[str, int], tuple[Any, Any]] = field(default_factory=dict)

    def apply(self, hidden: Float[Tensor, "B m D"]) -> Float[Tensor, "B n D"]:
        """Return states of the segment before as those of this one, with their gradients."""
        if self.mixing is not None:
            with exact_float32(hidden.device):  # as it was chosen
                made = self.mixing @ hidden.float()
            hidden = torch.cat([hidden, made.to(hidden)], dim=1)
        return hidden.gather(1, self.take[:, :, None].expand(-1, -1, hidden.shape[2]))

    def positions(self) -> Int[Tensor, "B n"]:
        """Return the positions of slots that are numbered anew."""
        return (self.shown.long().cumsum(dim=1) - 1).clamp(min=0)


@dataclass
class Plan:
    """What is kept inside the LLM of one prefill; it belongs to its forward and to the cache that this makes.

    Attributes:
        schedule: when stages run.
        visual: (B, L) which columns of the prompt are visual tokens.
        real: (B, L) which are no padding.
        queries: (B, Q) the last column of the prompt, or that before each supervised span.
        there: (B, Q) which of these exist; every row has the first.
        counts: of each row.
        whole: (S, B) of which rows each boundary drops nothing.
        text: of each row how many columns are neither padding nor visual.
        segments: what was decided, by boundary; None where nothing is dropped.
        raters: (B, L) whose attention is heard, by boundary, of stages that find it themselves.
        asked: (B, Q) their columns, and which of these exist, by boundary.
        noted: what was heard before its boundary, by boundary.
        left: (B,) how many visual tokens each stage left, by number of its boundary, where that was not compared yet.
    """

    schedule: Schedule
    visual: Bool[Tensor, "B L"]
    real: Bool[Tensor, "B L"]
    queries: Int[Tensor, "B Q"]
    there: Bool[Tensor, "B Q"]
    counts: list[Counts]
    whole: Bool[Tensor, "S B"]
    text: list[int]
    segments: dict[int, Segment | None] = field(default_factory=dict)
    raters: dict[int, Bool[Tensor, "B L"]] = field(default_factory=dict)
    asked: dict[int, tuple[Int[Tensor, "B Q"], Bool[Tensor, "B Q"]]] = field(default_factory=dict)
    noted: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    left: dict[int, Int[Tensor, " B"]] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """L, the columns of the prompt."""
        return self.visual.shape[1]

    def widths(self) -> list[int]:
        """Return how many slots of a row each layer processes, text, padding and filler included."""
        found = []
        for layer in range(self.schedule.layers):
            segment = self.before(layer)
            found.append(self.width if segment is None else segment.take.shape[1])
        return found

    def before(self, layer: int) -> Segment | None:
        """Return the segment in which a layer runs, by the boundaries below and at it; None is the whole prompt."""
        found = None
        for boundary, segment in self.segments.items():
            if boundary <= layer and segment is not None:
                found = segment
        return found

    def question(self) -> Bool[Tensor, "B L"]:
        """Return the text behind the first visual token (B, L), up to the last prompt token."""
        columns = torch.arange(self.width, device=self.visual.device)
        behind = self.visual.long().cumsum(dim=1) > 0
        return behind & self.real & ~self.visual & (columns <= self.queries[:, :1])

    def shown(self, segment: Segment | None) -> Bool[Tensor, "B n"]:
        """Return which slots are neither padding nor filler."""
        return self.real if segment is None else segment.shown

    def visual_slots(self, segment: Segment | None) -> Bool[Tensor, "B n"]:
        """Return which slots are visual tokens."""
        return self.visual if segment is None else segment.visual

    def own_columns(self, segment: Segment | None) -> Int[Tensor, "B n"]:
        """Return the column behind each slot; -1 behind filler and merged tokens, which are not what stood there."""
        if segment is None:
            return torch.arange(self.width, device=self.visual.device).expand(len(self.visual), -1)
        columns = segment.columns
        for other in (segment.filler, segment.merged):
            if other is not None:
                columns = columns.masked_fill(other, -1)
        return columns

    def slots_of(self, columns: Int[Tensor, "B Q"], segment: Segment | None) -> Int[Tensor, "B Q"]:
        """Return the slots of columns, and of a visual token that was dropped the last slot that is left before it.

        Text is never dropped; a prompt that ends with an image asks with a visual token.
        """
        if segment is None:
            return columns
        own = self.own_columns(segment)[:, None, :]
        return torch.where(own <= columns[:, :, None], own, -1).argmax(dim=2)

    def at_slots(self, values: Bool[Tensor, "B L"], segment: Segment | None) -> Bool[Tensor, "B n"]:
        """Return what is known of columns at the slots of a segment; filler and merged tokens have none of it."""
        own = self.own_columns(segment)
        return values.gather(1, own.clamp(min=0)) & (own >= 0)

    def entering(self, number: int) -> list[int]:
        """Return how many visual tokens of each row reach a boundary."""
        return [_entering(counts, number) for counts in self.counts]

    def drops(self, number: int) -> bool:
        """Return whether the stage of a boundary drops anything of any row."""
        return any(_entering(counts, number) != counts.after[number] for counts in self.counts)

    def decide(self, number: int, choice: Choice | None, dense: bool) -> None:
        """Take down what a stage keeps.

        Args:
            number: of the boundary, from 0.
            choice: what the stage answered; None if every row stays as it is.
            dense: whether slots are numbered anew.

        Raises:
            PruningError: for an answer of another shape, and on a CPU for another number of tokens than was asked for;
                elsewhere :meth:`check_left` says so when the layers have run.
        """
        boundary = self.schedule.points[number].boundary
        segment = self.before(boundary)
        if choice is None or not self.drops(number):
            self.segments[boundary] = None
            return
        after = [counts.after[number] for counts in self.counts]
        whole = self.whole[number]
        visual = self.visual_slots(segment)
        self._check_shape(number, choice.kept, visual)
        kept = torch.where(whole[:, None], visual, choice.kept & visual)
        width = max(text + count for text, count in zip(self.text, after, strict=True))
        ragged = any(text + count < width for text, count in zip(self.text, after, strict=True))
        shown = self.shown(segment)
        needed = (shown & ~visual) | kept
        columns = torch.arange(self.width, device=visual.device) if segment is None else segment.columns
        columns = columns.expand(len(visual), -1)
        merged = None if segment is None else segment.merged
        order = 2 * torch.arange(visual.shape[1], device=visual.device).expand(len(visual), -1)
        mixing = None
        if choice.merged is not None and any(choice.merged.counts):
            own = choice.merged
            mixing = own.mixing
            needed, columns, visual, merged, order = _with_merged(own, whole, kept, needed, columns, visual, merged)
        self.left[number] = (needed & visual).sum(dim=1)
        if visual.device.type == "cpu":
            self.check_left()
        # Stable sorting moves what is needed to the front without changing its order; the rest fills rows up.
        take = torch.sort((~needed).long(), dim=1, stable=True).indices[:, :width]
        take = take.gather(1, torch.sort(order.gather(1, take), dim=1, stable=True).indices)
        there = needed.gather(1, take)
        self.segments[boundary] = Segment(
            take=take,
            mixing=mixing,
            columns=columns.gather(1, take),
            shown=there,
            visual=visual.gather(1, take) & there,
            merged=None if merged is None else merged.gather(1, take) & there,
            filler=~there if ragged else None,
            dense=dense or (segment is not None and segment.dense),
        )

    def check_left(self) -> None:
        """Check that stages left as many visual tokens as they were asked for: text would be cut off in their place.

        Raises:
            PruningError: naming the stage.
        """
        if not self.left:
            return
        found = torch.stack(list(self.left.values())).tolist()
        numbers = list(self.left)
        self.left.clear()
        for number, rows in zip(numbers, found, strict=True):
            for row, (counts, left) in enumerate(zip(self.counts, rows, strict=True)):
                if left != counts.after[number]:
                    raise PruningError(
                        f"{self._named(number)} left {left} visual tokens in row {row}, and {counts.after[number]} "
                        "were asked for; its choose() keeps as many as `keep` says, and after() counts what it merges"
                    )

    def _check_shape(self, number: int, kept: Any, visual: Bool[Tensor, "B n"]) -> None:
        if isinstance(kept, Tensor) and kept.shape == visual.shape and kept.dtype == torch.bool:
            return
        got = f"{kept.dtype} {tuple(kept.shape)}" if isinstance(kept, Tensor) else type(kept).__name__
        raise PruningError(
            f"{self._named(number)} answered {got}; its choose() returns a Choice of bool {tuple(visual.shape)}, for "
            "each slot whether it stays"
        )

    def _named(self, number: int) -> str:
        point = self.schedule.points[number]
        return f"stage {point.name!r} at boundary {point.boundary}"

    def forget_made(self) -> None:
        """Free masks and rotations; they can be cut again."""
        for segment in self.segments.values():
            if segment is not None:
                segment.made.clear()

    def kept_columns(self, layer: int | None = None) -> Bool[Tensor, "B L"]:
        """Return which visual columns a layer processes, by default the last; centres stand for merged tokens."""
        segment = self.before(self.schedule.layers if layer is None else layer)
        if segment is None:
            return self.visual
        rows = torch.arange(len(self.visual), device=self.visual.device)[:, None].expand_as(segment.columns)
        kept = torch.zeros_like(self.visual)
        kept[rows[segment.visual], segment.columns[segment.visual]] = True
        return kept


def _entering(counts: Counts, number: int) -> int:
    return counts.after[number - 1] if number else counts.entering


def _with_merged(
    own: Merged,
    whole: Bool[Tensor, " B"],
    kept: Bool[Tensor, "B n"],
    needed: Bool[Tensor, "B n"],
    columns: Int[Tensor, "B n"],
    visual: Bool[Tensor, "B n"],
    merged: Bool[Tensor, "B n"] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what is known of slots with that of merged tokens behind them, and the order that all stand in."""
    count = own.centres.shape[1]
    device = kept.device
    numbers = torch.tensor(list(own.counts), device=device)
    made = (torch.arange(count, device=device) < numbers[:, None]) & ~whole[:, None]  # (B, M)
    places = torch.arange(kept.shape[1], device=device)
    # Behind the last visual token that stays, or the last there was.
    last = (places * visual).amax(dim=1, keepdim=True)
    stays = (places * kept).amax(dim=1, keepdim=True)
    last = torch.where(kept.any(dim=1, keepdim=True), stays, last)
    order = torch.cat([(2 * places).expand(len(kept), -1), (2 * last + 1).expand(-1, count)], dim=1)
    before = torch.zeros_like(kept) if merged is None else merged
    return (
        torch.cat([needed, made], dim=1),
        torch.cat([columns, columns.gather(1, own.centres)], dim=1),
        torch.cat([visual, made], dim=1),
        torch.cat([before, made], dim=1),
        order,
    )


def plan_of(
    schedule: Schedule,
    visual: Bool[Tensor, "B L"],
    mask: Shaped[Tensor, "B L"] | None = None,
    labels: Int[Tensor, "B L"] | None = None,
    schedules: Sequence[Schedule] | None = None,
) -> Plan:
    """Return the plan of a prompt, before anything is decided. This reads numbers back from the device once.

    Args:
        schedule: when stages run.
        visual: which columns hold visual tokens.
        mask: which are no padding; None is all.
        labels: of a training batch. The last prompt token is then the one before the first supervised span.
        schedules: what each row's counts are of; None is ``schedule`` for all.

    Raises:
        PruningError: for a budget that a row can't have, and for a row without a prompt.
    """
    real = torch.ones_like(visual) if mask is None else mask.bool()
    visual = visual & real
    columns = torch.arange(visual.shape[1], device=visual.device)
    queries = (columns * real).amax(dim=1, keepdim=True)
    there = torch.ones_like(queries, dtype=torch.bool)
    spans = torch.ones(len(visual), dtype=torch.long, device=visual.device)
    promptless = torch.zeros_like(spans)
    if labels is not None:
        supervised = (labels != IGNORE_INDEX) & real
        begins = supervised[:, 1:] & ~supervised[:, :-1] & real[:, :-1]  # at the column before each span
        spans = begins.sum(dim=1)
        first = real.long().argmax(dim=1, keepdim=True)
        promptless = supervised.gather(1, first)[:, 0].long()
    read = torch.stack([visual.sum(dim=1), real.sum(dim=1), spans, promptless], dim=1).tolist()
    if labels is not None:
        _check_prompts(read)
        most = max(1, *(row[2] for row in read))
        found = torch.sort((~begins).long(), dim=1, stable=True).indices[:, :most]
        there = torch.arange(found.shape[1], device=found.device) < spans[:, None]
        queries = torch.where(there, found, queries)
        there = there.clone()
        there[:, 0] = True  # a row without any answer asks with its last token
    own = [schedule] * len(read) if schedules is None else schedules
    counts = [_row_counts(one, row[0], bool(row[2])) for one, row in zip(own, read, strict=True)]
    text = [length - entering for entering, length, *_ in read]
    same = [[_entering(row, number) == row.after[number] for row in counts] for number in range(len(schedule.points))]
    whole = torch.tensor(same, device=visual.device)
    return Plan(schedule, visual, real, queries, there, counts, whole, text)


def _check_prompts(read: Sequence[Sequence[int]]) -> None:
    """Check that rows with visual tokens have a prompt: answers must not choose."""
    for row, (entering, _, _, promptless) in enumerate(read):
        if entering and promptless:
            raise PruningError(
                f"labels supervise row {row} from its first token on, so there is no prompt whose last token stages "
                "could ask; set labels of the prompt to -100"
            )


def _row_counts(schedule: Schedule, entering: int, answered: bool) -> Counts:
    counts = schedule.counts(entering)
    if answered or not entering or not any(point.stage.needs_answer for point in schedule.points):
        return counts
    if len({type(point.stage) for point in schedule.points}) > 1:
        raise PruningError(
            "a training row without a supervised token stays whole in some of these stages and is cut in others; leave "
            "such rows out, or train with one stage"
        )
    points = (entering,) * len(schedule.points)
    return Counts(entering, points, points, (entering,) * schedule.layers)


def decode_seen(shown: Bool[Tensor, "B n"], later: Sequence[int]) -> Bool[Tensor, "B 1 q n2"]:
    """Return what ``q`` new tokens see of the slots of a segment and of the ``t`` tokens behind the prompt.

    Args:
        shown: which slots are neither padding nor filler.
        later: q and t.
    """
    new, behind = later
    order = torch.ones(new, behind, dtype=torch.bool, device=shown.device).tril(diagonal=behind - new)
    prompt = shown[:, None, :].expand(-1, new, -1)
    return torch.cat([prompt, order.expand(len(shown), -1, -1)], dim=2)[:, None]
