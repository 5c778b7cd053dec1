"""A run's own numbers: speed, MFU, where the time goes, peak memory, kept tokens, and how good the prediction was.

The trainer says what begins and ends (:meth:`RunNumbers.phase`) and what a step holds (:meth:`RunNumbers.add`); every
logged row asks for the numbers since the row before (:meth:`RunNumbers.row`). On a GPU phases are timed by events that
the device passes and that are read only when a row is logged, so nothing waits for the device in between.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunetune.train.flops import Work, flops_of
from prunetune.train.gpus import gpu_of_device
from prunetune.train.shape import ModelShape

PHASES = ("data", "selection", "forward", "backward", "optimizer")
"""Waiting for a batch; tower and pruner; the LLM forward and backward; the update."""
ON_HOST = {"data"}
"""Phases in which the process waits, and the device does nothing that could be timed."""


@dataclass
class Kept:
    """Visual tokens kept of images: how many images, all their tokens, the least and the most."""

    images: int = 0
    tokens: int = 0
    least: int | None = None
    most: int | None = None

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Kept:
        """Return the same of some images."""
        return cls(len(numbers), sum(numbers), min(numbers, default=None), max(numbers, default=None))

    def __add__(self, other: Kept) -> Kept:
        least = [number for number in (self.least, other.least) if number is not None]
        most = [number for number in (self.most, other.most) if number is not None]
        return Kept(
            self.images + other.images,
            self.tokens + other.tokens,
            min(least, default=None),
            max(most, default=None),
        )

    def row(self) -> dict[str, Any]:
        """Return mean, least and most per image; nothing if there was no image."""
        if not self.images:
            return {}
        return {"kept_mean": round(self.tokens / self.images, 2), "kept_min": self.least, "kept_max": self.most}


@dataclass
class Inside:
    """Visual tokens that layers of the LLM processed where stages drop some: how many samples, and each layer's sum."""

    samples: int = 0
    layers: tuple[int, ...] = ()

    @classmethod
    def of(cls, counts: Sequence[Sequence[int]]) -> Inside:
        """Return the same of some samples, from each one's tokens in every layer."""
        return cls(len(counts), tuple(sum(layer) for layer in zip(*counts, strict=True)))

    def __add__(self, other: Inside) -> Inside:
        if not (self.samples and other.samples):
            return self if self.samples else other
        layers = tuple(one + two for one, two in zip(self.layers, other.layers, strict=True))
        return Inside(self.samples + other.samples, layers)

    def row(self) -> dict[str, Any]:
        """Return samples, sums by layer and the mean of a sample and layer; nothing if nothing was counted."""
        if not self.samples:
            return {}
        average = sum(self.layers) / len(self.layers) / self.samples
        return {"llm_samples": self.samples, "llm_layers": list(self.layers), "llm_average_tokens": round(average, 2)}


def inside_of_log(log: Path) -> dict[str, Any] | None:
    """Return what the layers of the LLM processed of a sample with an image, means over a log; None without stages.

    It is of the first rank's samples, whose rows a continued run goes on with.
    """
    total = Inside()
    if not log.is_file():  # no step was taken
        return None
    for line in log.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "llm_samples" in row:
            total += Inside(row["llm_samples"], tuple(row["llm_layers"]))
    if not total.samples:
        return None
    layers = [round(count / total.samples, 4) for count in total.layers]
    average = round(sum(total.layers) / total.samples / len(layers), 4)
    return {"samples": total.samples, "entering": layers[0], "final": layers[-1], "average": average, "layers": layers}


@dataclass
class Counted:
    """What was counted since the last row, or in the whole run."""

    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    work: Work = field(default_factory=Work)
    kept: Kept = field(default_factory=Kept)
    inside: Inside = field(default_factory=Inside)
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@dataclass
class _Open:
    """A phase that has begun; what runs within it, under a name of its own, is not counted twice."""

    name: str
    began: Any


class RunNumbers:
    """Collects a run's numbers on one rank.

    Args:
        device: where the model runs.
        shape: of the model, for MFU; None leaves it out.
        ranks: devices, all of which are taken to do as much as this one.
        peak: FLOP/s of one device in the dtype of the run; None is :func:`device_peak`, and where that is not known
            MFU is left out.
        stop_tower: whether vision layers that nothing reads are left out, as ``engine.stop_tower``.
        predicted: seconds that the run was predicted to take; None if nobody did.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        device: torch.device | str,
        shape: ModelShape | None = None,
        ranks: int = 1,
        peak: float | None = None,
        stop_tower: bool = True,
        predicted: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device = torch.device(device)
        self.shape = shape
        self.ranks = ranks
        self.peak = peak if peak is not None else device_peak(self.device)
        self.stop_tower = stop_tower
        self.predicted = predicted
        self.clock = clock
        self.since = Counted()
        self.whole = Counted()
        self._stack: list[_Open] = []
        self._timed: list[tuple[str, Any, Any, int]] = []
        self._unread: list[Tensor | Sequence[int]] = []  # kept tokens, maybe still on the device
        self._began = clock()

    def begin(self) -> None:
        """Begin to count here: what was done before the first step is no part of the run's speed."""
        self.since, self._timed, self._unread = Counted(), [], []
        self._began = self.clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs within; a phase within a phase is counted for itself alone.

        Args:
            name: one of ``PHASES``, or any other that a row shall show.
        """
        on_host = self.device.type != "cuda" or name in ON_HOST
        opened = _Open(name, self._mark(on_host))
        self._stack.append(opened)
        try:
            yield
        finally:
            self._stack.pop()
            ended = self._mark(on_host)
            self._timed.append((name, opened.began, ended, 1))
            # What this took is taken off the phase around it, where both are timed by the same clock.
            around = next((outer for outer in reversed(self._stack) if type(outer.began) is type(ended)), None)
            if around is not None:
                self._timed.append((around.name, opened.began, ended, -1))

    def add(
        self,
        samples: int,
        tokens: int,
        supervised: int = 0,
        work: Work | None = None,
        kept: Tensor | Sequence[int] | None = None,
        inside: Sequence[Sequence[int]] = (),
    ) -> None:
        """Count a micro-batch.

        Args:
            samples: in it.
            tokens: of the LLM, after pruning, padding included where there is any.
            supervised: tokens with a loss.
            work: what it costs, for MFU; None counts the tokens' linear layers alone.
            kept: visual tokens kept of every image; a tensor may lie on the device, and is read when a row is logged.
            inside: with stages, visual tokens in each layer of the LLM, of every sample that has any.
        """
        self.since.inside += Inside.of(inside)
        self.since.samples += samples
        self.since.tokens += tokens
        self.since.supervised += supervised
        self.since.work += work if work is not None else Work(tokens=tokens, logits=supervised)
        if kept is not None:
            self._unread.append(kept)

    def row(self) -> dict[str, Any]:
        """Return the numbers since the last row, for the log; this waits for the device.

        ``samples_per_second`` and ``tokens_per_second`` are over all ranks; ``mfu`` is a device's; ``data_wait`` is
        the share of time in which this rank waited for a batch; ``seconds_*`` are of phases, per row; ``memory_gib``
        is the peak since the start: of the device's allocator, or of the process on a CPU.
        """
        now = self._close()
        since = self.since
        since.seconds = now - self._began
        self._began = now
        row = self._numbers(since)
        self._add_to_whole(since)
        self.since = Counted()
        return row

    def summary(self) -> dict[str, Any]:
        """Return the numbers of the whole run, with the prediction and by how much it was off.

        ``prediction_error`` is measured / predicted - 1: 0.1 is a run that took 10 % longer than predicted.
        """
        self.row()
        summary = self._numbers(self.whole)
        summary["measured_seconds"] = round(self.whole.seconds, 1)
        if self.predicted:
            summary["predicted_seconds"] = round(self.predicted, 1)
            summary["prediction_error"] = round(self.whole.seconds / self.predicted - 1, 3)
        return summary

    def _mark(self, on_host: bool) -> Any:
        if on_host:
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _close(self) -> float:
        """Add up the timed phases and return the time of now; on a GPU everything that was asked for is done then."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for name, began, ended, sign in self._timed:
            seconds = began.elapsed_time(ended) / 1000 if hasattr(began, "elapsed_time") else ended - began
            self.since.phases[name] += sign * seconds
        for kept in self._unread:
            self.since.kept += Kept.of(kept.flatten().tolist() if isinstance(kept, Tensor) else kept)
        self._timed, self._unread = [], []
        return self.clock()

    def _numbers(self, counted: Counted) -> dict[str, Any]:
        seconds = max(counted.seconds, 1e-9)
        numbers: dict[str, Any] = {
            "samples_per_second": round(counted.samples * self.ranks / seconds, 2),
            "tokens_per_second": round(counted.tokens * self.ranks / seconds, 1),
            "tokens": counted.tokens,
            "supervised_tokens": counted.supervised,
        }
        if self.shape is not None and self.peak:
            needed = flops_of(self.shape, counted.work, stop_tower=self.stop_tower).model
            numbers["mfu"] = round(needed / (seconds * self.peak), 4)
        numbers["data_wait"] = round(counted.phases.get("data", 0.0) / seconds, 4)
        for name, took in counted.phases.items():
            numbers[f"seconds_{name}"] = round(took, 4)
        numbers["memory_gib"] = round(peak_memory(self.device) / 1024**3, 3)
        return numbers | counted.kept.row() | counted.inside.row()

    def _add_to_whole(self, since: Counted) -> None:
        whole = self.whole
        whole.samples += since.samples
        whole.tokens += since.tokens
        whole.supervised += since.supervised
        whole.work += since.work
        whole.seconds += since.seconds
        for name, took in since.phases.items():
            whole.phases[name] += took
        whole.kept += since.kept
        whole.inside += since.inside


def in_a_line(summary: Mapping[str, Any]) -> str:
    """Return the numbers of a whole run for people."""
    parts = [
        f"{summary['measured_seconds']:,.0f} s, {summary['samples_per_second']:,.1f} samples/s, "
        f"{summary['tokens_per_second']:,.0f} tokens/s"
    ]
    if "mfu" in summary:
        parts.append(f"MFU {summary['mfu']:.1%}")
    parts.append(f"{summary['data_wait']:.1%} waiting for data, {summary['memory_gib']:.1f} GiB at most")
    if "prediction_error" in summary:
        parts.append(f"predicted {summary['predicted_seconds']:,.0f} s, off by {summary['prediction_error']:+.0%}")
    return f"measured: {', '.join(parts)}"


def device_peak(device: torch.device) -> float | None:
    """Return a GPU's dense bfloat16 peak in FLOP/s by its name; None for one that is not known, and for a CPU."""
    if device.type != "cuda":
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.bfloat16 * 1e12


def measured_peak(device: torch.device | str, dtype: torch.dtype, size: int = 1024) -> float:
    """Return the FLOP/s of one large matrix product, the best of three: a yardstick where no data sheet has one.

    Args:
        device: where.
        dtype: of the matrices.
        size: rows and columns.
    """
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):  # the first is for what is only set up
        began = time.perf_counter()
        product = matrix @ matrix
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were in use: of the device's tensors, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024  # Linux counts in KiB
