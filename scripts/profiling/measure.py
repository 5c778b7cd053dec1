"""Measures arms side by side: every round runs each of them once, so that what drifts drifts for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from prunetune.pruning import PrunedModel, PruningSpec
from prunetune.scripts.profiling.accounting import cache_bytes, flop_of
from prunetune.scripts.profiling.energy import energy_counter
from prunetune.scripts.profiling.load import Load, run_load
from prunetune.scripts.profiling.record import ArmCost, BatchCost, LoadCost, Number
from prunetune.scripts.profiling.requests import Requests
from prunetune.scripts.profiling.stages import (
    Generated,
    Now,
    Staged,
    clock,
    flop_counter,
    generated,
    generated_by_stock,
    layers_of,
    measured_cache,
    staged,
)
from prunetune.train.flops import Work
from prunetune.train.shape import ModelShape, shape_of
from prunetune.train.visual import tower_work


@dataclass(frozen=True)
class Settings:
    """How it is measured.

    Attributes:
        sizes: of the batches.
        repeats: measured rounds.
        warmup: rounds before them.
        new_tokens: length of every answer.
        clients: requests in flight of the load test; 0 makes none.
        requests: answers of each of its rounds.
        at_most: requests that one of its batches takes.
        rounds: of the load test.
    """

    sizes: Sequence[int] = (1,)
    repeats: int = 10
    warmup: int = 2
    new_tokens: int = 16
    clients: int = 0
    requests: int = 64
    at_most: int = 8
    rounds: int = 6


@dataclass(frozen=True)
class Subject:
    """An arm to be measured.

    Attributes:
        row: its name in the table.
        label: for people.
        spec: how it is pruned.
        pruned: the model with its pruner; None if it could not be made.
        requests: what it is asked.
        refused: why it could not be made.
    """

    row: str
    label: str
    spec: PruningSpec
    pruned: PrunedModel | None = None
    requests: Requests | None = None
    refused: str | None = None

    @property
    def ready(self) -> tuple[PrunedModel, Requests]:
        """The model and what it is asked."""
        assert self.pruned is not None and self.requests is not None, self.refused
        return self.pruned, self.requests


@dataclass
class _Rounds:
    """What one arm's rounds took."""

    inputs: list[float] = field(default_factory=list)
    staged: list[dict[str, float]] = field(default_factory=list)
    generated: list[Generated] = field(default_factory=list)
    stock: list[Generated] = field(default_factory=list)
    peak: int = 0


@torch.inference_mode()
def measure(subjects: Sequence[Subject], settings: Settings, tell: Callable[[str], None]) -> list[ArmCost]:
    """Measure arms of one model.

    Args:
        subjects: the first of those that could be made is dense, and the others are compared with it.
        settings: how.
        tell: is called with a line now and then.
    """
    able = [subject for subject in subjects if subject.refused is None]
    batches: dict[str, list[BatchCost]] = {subject.row: [] for subject in able}
    for size in settings.sizes:
        tell(f"batches of {size}: {len(able)} arms, {settings.warmup} + {settings.repeats} rounds")
        for subject, cost in zip(able, _of_size(able, size, settings), strict=True):
            batches[subject.row].append(cost)
    loads: list[LoadCost | None] = [None] * len(able)
    if settings.clients:
        tell(f"load: {settings.clients} requests in flight, {settings.rounds} rounds of {settings.requests}")
        loads = [*_under_load(able, settings)]
    by_row = dict(zip(batches, loads, strict=True))
    found = []
    for subject in subjects:
        about = {"row": subject.row, "label": subject.label, "pruning": subject.spec}
        if subject.refused is None:
            found.append(ArmCost(**about, batches=batches[subject.row], load=by_row[subject.row]))
        else:
            found.append(ArmCost(**about, refused=subject.refused))
    return found


def in_turn(subjects: Sequence[Subject], number: int) -> list[int]:
    """Return the places of the arms in the order of a round: each is first as often as any other."""
    first = number % len(subjects)
    return [*range(first, len(subjects)), *range(first)]


def _of_size(subjects: Sequence[Subject], size: int, settings: Settings) -> list[BatchCost]:
    rounds = [_Rounds() for _ in subjects]
    counted = [_counted(subject, size, settings.new_tokens) for subject in subjects]
    now = clock(subjects[0].ready[0].model.device)
    for number in range(settings.warmup + settings.repeats):
        for place in in_turn(subjects, number):
            own = rounds[place] if number >= settings.warmup else _Rounds()
            if place == 0 and number % 2:  # before and after dense in turn
                _stock_round(subjects[place], size, settings.new_tokens, now, own)
            _one_round(subjects[place], size, settings.new_tokens, now, own)
            if place == 0 and not number % 2:
                _stock_round(subjects[place], size, settings.new_tokens, now, own)
    return [_cost(counted[place], own, rounds[0], size, place == 0) for place, own in enumerate(rounds)]


def _one_round(subject: Subject, size: int, new_tokens: int, now: Now, rounds: _Rounds) -> None:
    pruned, requests = subject.ready
    began = now()
    inputs = requests.batch(range(size))
    rounds.inputs.append(now() - began)
    rounds.staged.append(staged(pruned, inputs, now).spent)
    device = pruned.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rounds.generated.append(generated(pruned, inputs, new_tokens, now))
    if device.type == "cuda":
        rounds.peak = max(rounds.peak, torch.cuda.max_memory_allocated(device))


def _stock_round(subject: Subject, size: int, new_tokens: int, now: Now, rounds: _Rounds) -> None:
    pruned, requests = subject.ready
    rounds.stock.append(generated_by_stock(pruned, requests.batch(range(size)), new_tokens, now))


@dataclass(frozen=True)
class _Counted:
    """What follows from an arm's batch and its model's shape, without a clock."""

    tokens: int
    kept: float
    average: float | None
    layers: list[int]
    flop: dict[str, float]
    counted: dict[str, float]
    cache: float
    cache_measured: float | None


def _counted(subject: Subject, size: int, new_tokens: int) -> _Counted:
    """Run a batch while torch counts, and put beside it what the shape says."""
    pruned, requests = subject.ready
    model, shape = pruned.model, shape_of(pruned.model)
    inputs = requests.batch(range(size))
    with flop_counter() as now:
        seen = staged(pruned, inputs, now)
        decode = generated(pruned, inputs, new_tokens, now).rest
    layers = layers_of(pruned, seen.prepared, seen.plan)
    flop = flop_of(shape, _encoded(shape, pruned, inputs, seen).times(1 / size), layers, new_tokens)
    measured = measured_cache(seen.cache)
    kept = sum(sum(counts) for counts in seen.prepared.kept.values())
    return _Counted(
        tokens=int(seen.prepared.inputs["input_ids"].shape[1]),
        kept=kept / size,
        average=None if seen.plan is None else sum(counts.average for counts in seen.plan.counts) / size,
        layers=layers,
        flop=flop.parts(),
        counted={stage: spent / size for stage, spent in {**seen.spent, "decode": decode}.items()},
        cache=cache_bytes(shape.language, layers, model.dtype.itemsize),
        cache_measured=None if measured is None else measured / size,
    )


def _encoded(shape: ModelShape, pruned: PrunedModel, inputs: dict, seen: Staged) -> Work:
    """Return the work of the vision side of a batch."""
    projected = sum(vision.total for vision in seen.prepared.vision.values())
    return tower_work(pruned.model, inputs) + Work(projected=projected)


def _cost(counted: _Counted, own: _Rounds, dense: _Rounds, size: int, is_dense: bool) -> BatchCost:
    stages = {"inputs": Number.of(_milli(own.inputs))}
    for stage in own.staged[0]:
        stages[stage] = Number.of(_milli([spent[stage] for spent in own.staged]))
    rest = [one.rest for one in own.generated]
    rate = None
    if min(rest) > 0:
        steps = own.generated[0].tokens.shape[1] - 1
        rate = Number.of([size * steps / seconds for seconds in rest])
    return BatchCost(
        size=size,
        **vars(counted),
        stages=stages,
        prefill=Number.of(_milli(_prefills(own))),
        first_token=Number.of(_milli([one.first for one in own.generated])),
        end_to_end=Number.of(_milli([one.whole for one in own.generated])),
        decode=rate,
        faster={} if is_dense else _faster(own, dense),
        over_stock=_over_stock(own),
        same_as_stock=_same_as_stock(own) if own.stock else None,
        peak=own.peak or None,
    )


def _faster(own: _Rounds, dense: _Rounds) -> dict[str, Number]:
    """Return how many times as fast as dense, each round against the dense run of the same round."""
    pairs = {
        "prefill": (_prefills(dense), _prefills(own)),
        "first token": ([one.first for one in dense.generated], [one.first for one in own.generated]),
        "decode": ([one.rest for one in dense.generated], [one.rest for one in own.generated]),
        "end to end": ([one.whole for one in dense.generated], [one.whole for one in own.generated]),
    }
    found = {}
    for name, (theirs, ours) in pairs.items():
        if min(ours) > 0:
            found[name] = Number.of([their / our for their, our in zip(theirs, ours, strict=True)])
    return found


def _prefills(rounds: _Rounds) -> list[float]:
    """Return the seconds of the LLM over the prompts, with what stages compute between its layers."""
    return [spent["prefill"] + spent["inside"] for spent in rounds.staged]


def _over_stock(own: _Rounds) -> dict[str, Number]:
    pairs = {
        "decode": [(one.rest, stock.rest) for one, stock in zip(own.generated, own.stock, strict=False)],
        "end to end": [(one.whole, stock.whole) for one, stock in zip(own.generated, own.stock, strict=False)],
    }
    found = {}
    for name, both in pairs.items():
        if both and min(stock for _, stock in both) > 0:
            found[name] = Number.of([our / stock for our, stock in both])
    return found


def _same_as_stock(own: _Rounds) -> bool:
    return all(torch.equal(one.tokens, stock.tokens) for one, stock in zip(own.generated, own.stock, strict=True))


def _under_load(subjects: Sequence[Subject], settings: Settings) -> list[LoadCost]:
    loads: list[list[Load]] = [[] for _ in subjects]
    joules: list[list[float]] = [[] for _ in subjects]
    energy, _ = energy_counter(subjects[0].ready[0].model.device)
    for number in range(1 + settings.rounds):  # the first warms up
        for place in in_turn(subjects, number):
            before = math.nan if energy is None else energy()
            load = _one_load(subjects[place], settings)
            if number == 0:
                continue
            loads[place].append(load)
            if energy is not None:
                joules[place].append((energy() - before) / len(load.waits))
    found = []
    for own, spent in zip(loads, joules, strict=True):
        sizes = [size for load in own for size in load.batches]
        found.append(
            LoadCost(
                clients=settings.clients,
                requests=settings.requests,
                at_most=settings.at_most,
                batch=sum(sizes) / len(sizes),
                rate=Number.of([load.rate for load in own]),
                half=Number.of(_milli([load.waited(0.5) for load in own])),
                nearly_all=Number.of(_milli([load.waited(0.95) for load in own])),
                faster=Number.of([load.rate / dense.rate for load, dense in zip(own, loads[0], strict=True)]),
                joules=Number.of(spent) if spent else None,
            )
        )
    return found


def _one_load(subject: Subject, settings: Settings) -> Load:
    pruned, requests = subject.ready
    now = clock(pruned.model.device)

    @torch.inference_mode()  # of this thread alone, and another one answers
    def answer(numbers: Sequence[int]) -> None:
        generated(pruned, requests.batch(numbers), settings.new_tokens, now)

    return run_load(answer, settings.clients, settings.requests, settings.at_most)


def _milli(seconds: Sequence[float]) -> list[float]:
    return [1000 * one for one in seconds]
