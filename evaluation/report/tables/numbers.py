"""The numbers of a table by arm: each metric, and the same of bootstrap samples that all arms share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.metrics.intervals import RESAMPLES
from prunetune.evaluation.metrics.metric import Metric, Tally, interval, resampled, tallied
from prunetune.evaluation.report.arms import EvaluatedArm
from prunetune.evaluation.report.places import without_folders
from prunetune.evaluation.report.tables.table import Column, Value
from prunetune.evaluation.tasks.base import ACCURACY, Benchmark, Scored, get_task, tally_scores, unit_of

UNDEFINED = "not defined for these answers"


@dataclass(frozen=True)
class Numbers:
    """A number of every arm.

    Attributes:
        values: by arm; None where it is not defined.
        draws: of the bootstrap samples (RESAMPLES, A), the same samples for all arms; None where there are none.
        note: why there is no number, or what is special about it.
        metric: what it is; None of a number that is no metric of counts.
        tallies: what it was computed from, by arm.
    """

    values: list[float | None]
    draws: np.ndarray | None = None
    note: str = ""
    metric: Metric | None = None
    tallies: Sequence[Tally] = ()

    def of(self, places: Sequence[int]) -> Value:
        """Return the number of a row: of one arm, or the mean over several trainings.

        The interval of a mean is over images alone; what trainings differ by stands apart.
        """
        own = [self.values[place] for place in places]
        there = [value for value in own if value is not None]
        if len(there) < len(own):
            return Value(value=None, note=self.note or UNDEFINED, seeds=len(own))
        limits = None if self.draws is None else interval(self.draws[:, places].mean(axis=1))
        between = float(np.std(there, ddof=1)) if len(there) > 1 else None
        mean = there[0] if len(there) == 1 else float(np.mean(there))
        return Value(value=mean, interval=limits, note=self.note, seeds=len(own), between=between)


@dataclass(frozen=True)
class Measured:
    """A column with its numbers."""

    column: Column
    numbers: Numbers

    @property
    def weighed(self) -> bool:
        """Whether it enters the relative average: papers print it, more is better, and it has bootstrap samples."""
        return self.column.headline and self.column.higher and self.numbers.draws is not None


def measured(arms: Sequence[EvaluatedArm], seed: int) -> list[Measured]:
    """Return all columns of arms that answered the same questions."""
    found = []
    for name in arms[0].manifest.tasks:
        task = get_task(name)
        if task.hidden:
            found.append(_hidden(name, arms))
        elif native(task, arms[0].answers[name]):
            found += _native(name, task, arms, seed)
        else:
            found += _of_sets(name, arms)
    return found


def native(task: Benchmark, answers: Sequence[Scored]) -> list[Metric]:
    """Return the metrics that can be computed from answers with their scores."""
    metrics = [] if task.scorer is None else list(task.scorer.metrics)
    if any(one.score is None for one in answers):
        # Of some only a whole set has a score. Metrics that count in the answers' text need none.
        metrics = [metric for metric in metrics if metric.tally is not tally_scores]
    return metrics


def numbers_of(metrics: Sequence[Metric], answers: Sequence[Sequence[Scored]], seed: int) -> list[Numbers]:
    """Return metrics of the answers of all arms (A, M): one set of bootstrap samples serves all that count alike."""
    drawn: dict[object, tuple[list[Tally], np.ndarray]] = {}
    found = []
    for metric in metrics:
        if metric.tally not in drawn:
            try:
                tallies = [metric.tally(own) for own in answers]
            except TaskError as error:  # what counts captions needs a program that may not be here
                note = without_folders(f"{error}; manifest.json has what was reached")
                found.append(Numbers([None] * len(answers), note=note))
                continue
            drawn[metric.tally] = tallies, resampled(tallies, seed)
        tallies, counts = drawn[metric.tally]
        with np.errstate(divide="ignore", invalid="ignore"):  # not defined is NaN, which is looked for
            values = [metric.of_counts(tally.counts.sum(axis=0)) for tally in tallies]
            found.append(Numbers(values, metric.value(counts), metric=metric, tallies=tallies))
    return found


def pooled(arms: Sequence[EvaluatedArm], seed: int) -> Numbers | None:
    """Return the accuracy over the items of all benchmarks that score items one by one; None without any."""
    names = [name for name, own in arms[0].answers.items() if all(one.score is not None for one in own)]
    if not names:
        return None

    def tally(arm: EvaluatedArm) -> Tally:
        units, rows = [], []
        for name in names:
            for one in arm.answers[name]:
                units.append(f"{name}/{unit_of(one.item)}")  # "1.jpg" of two benchmarks are two images
                rows.append((one.score or 0.0, 1.0))
        return tallied(units, rows)

    tallies = [tally(arm) for arm in arms]
    values = [ACCURACY.of_counts(one.counts.sum(axis=0)) for one in tallies]
    return Numbers(values, ACCURACY.value(resampled(tallies, seed)), metric=ACCURACY, tallies=tallies)


def relative(columns: Sequence[Measured], dense: Sequence[int | None], seed: int) -> Numbers | None:
    """Return the mean over benchmarks of headline metric / the dense arm's, in percent; None without a benchmark.

    Args:
        columns: of the table.
        dense: place of each arm's dense arm (A,): None without one, and then there is no number.
        seed: of the order in which benchmarks' samples meet.
    """
    weighed = [column.numbers for column in columns if column.weighed]
    if not weighed or all(place is None for place in dense):
        return None
    values: list[float | None] = []
    draws = np.full((RESAMPLES, len(dense)), np.nan)
    orders = sample_orders(len(weighed), seed)
    for arm, base in enumerate(dense):
        values.append(None if base is None else _mean_of_ratios(weighed, arm, base))
        if base is not None:
            # The dense arm is inside the sample: an image that both get right by chance does not count twice.
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = [_draws(one)[order, arm] / _draws(one)[order, base]
                          for one, order in zip(weighed, orders, strict=True)]  # fmt: skip
            draws[:, arm] = 100 * np.mean(ratios, axis=0)
    return Numbers(values, draws, note="")


def _mean_of_ratios(weighed: Sequence[Numbers], arm: int, base: int) -> float | None:
    ratios = []
    for one in weighed:
        own, dense = one.values[arm], one.values[base]
        if own is None or not dense:  # nothing is a share of nothing
            return None
        ratios.append(own / dense)
    return 100 * sum(ratios) / len(ratios)


def _draws(numbers: Numbers) -> np.ndarray:
    assert numbers.draws is not None  # of what is weighed
    return numbers.draws


def sample_orders(number: int, seed: int) -> list[np.ndarray]:
    """Return in which order the samples of each of some benchmarks are taken, where benchmarks are put together.

    Two benchmarks with equally many images are drawn by the same random numbers. Their images have nothing to do with
    one another, and neither have their samples once their order is another.
    """
    return [np.random.default_rng((seed, place)).permutation(RESAMPLES) for place in range(number)]


def kinds_of(task: Benchmark, answers: Sequence[Scored]) -> dict[str, list[int]]:
    """Return the positions of the answers of each kind of question; nothing where all are of one kind."""
    aspects: dict[str, dict[str, list[int]]] = {}
    for place, one in enumerate(answers):
        for aspect, kind in task.kinds(one.item).items():
            aspects.setdefault(aspect, {}).setdefault(kind, []).append(place)
    found: dict[str, list[int]] = {}
    for aspect, kinds in aspects.items():
        if len(kinds) == 1:
            continue
        for kind in sorted(kinds):
            # Two aspects may share a kind's name: the later one says which it is.
            found[kind if kind not in found else f"{aspect} {kind}"] = kinds[kind]
    return found


def _native(name: str, task: Benchmark, arms: Sequence[EvaluatedArm], seed: int) -> list[Measured]:
    answers = [arm.answers[name] for arm in arms]
    metrics = native(task, answers[0])
    found = []
    for place, (metric, numbers) in enumerate(zip(metrics, numbers_of(metrics, answers, seed), strict=True)):
        column = _column(name, arms[0], metric.name, metric.about)
        column = column.model_copy(update={"unit": metric.unit, "higher": metric.higher, "headline": place == 0})
        found.append(Measured(column, numbers))
    return found


def _hidden(name: str, arms: Sequence[EvaluatedArm]) -> Measured:
    uploads = []
    for arm in arms:
        summary = (arm.manifest.metrics or {}).get(name)
        uploads.append(summary.upload if summary is not None else None)
    note = f"hidden answers: {uploads[0]}" if uploads[0] else "hidden answers"
    column = _column(name, arms[0], "accuracy", "what the benchmark's server says of the answers").model_copy(
        update={"unit": "%"}
    )
    return Measured(column, Numbers([None] * len(arms), note=note))


def set_metrics(arm: EvaluatedArm, name: str) -> dict[str, float]:
    """Return a benchmark's metrics as they were computed when an arm was evaluated: those that are one number."""
    summary = (arm.manifest.metrics or {}).get(name)
    found = {}
    for key, value in ({} if summary is None else summary.metrics).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[key] = float(value)
    return found


def _of_sets(name: str, arms: Sequence[EvaluatedArm]) -> list[Measured]:
    """Return the metrics of a benchmark that only scores whole sets, as the arms' manifests have them."""
    by_arm = [set_metrics(arm, name) for arm in arms]
    found = []
    for place, key in enumerate(by_arm[0]):
        column = _column(name, arms[0], key, "a score of the whole set").model_copy(update={"headline": place == 0})
        found.append(Measured(column, Numbers([own.get(key) for own in by_arm])))
    return found


def _column(name: str, arm: EvaluatedArm, metric: str, about: str) -> Column:
    record = arm.manifest.tasks[name]
    about = f"{about}; protocol {record.protocol}, prompt: {record.prompt}"
    return Column(task=name, metric=metric, unit="score", about=about, items=record.items)


def only(numbers: Sequence[Scored], places: Sequence[int]) -> list[Scored]:
    """Return the answers at some positions."""
    return [numbers[place] for place in places]
