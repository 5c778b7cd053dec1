"""Invented objects: attention-based against diversity-based methods, from finished evaluations on CHAIR and POPE.

The adaptive pruning study's tables 2 and 8: diversity-based methods name more objects that are there, and more that are
not. What POPE says beside accuracy is how often an arm says yes, and how often it does so wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunetune.evaluation.analysis.figures import COLORS, MARKERS, drawn, whiskers
from prunetune.evaluation.analysis.pages import Figure, Part, write_table
from prunetune.evaluation.analysis.statistics import Estimate
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.metrics.metric import Tally, interval, resampled, share
from prunetune.evaluation.report.arms import EvaluatedArm, read_arm
from prunetune.evaluation.report.comparable import check_allowed, check_comparable
from prunetune.evaluation.tasks import chair, pope

KINDS = {
    "fastervlm": "attention",
    "prumerge_plus": "attention",
    "vispruner": "attention",
    "divprune": "diversity",
    "fps": "diversity",
}
"""As the adaptive pruning study's table 2 groups them; every other method is "other", unless the configuration says."""
DIVERSE = "diversity (mean)"
ORDER = ("dense", "attention", "diversity", "other")


@dataclass(frozen=True)
class Rate:
    """A number of a benchmark's counts.

    Attributes:
        name: in tables.
        about: beside the figure's axis.
        value: from counts (..., P).
    """

    name: str
    about: str
    value: Any


def _pope(part: Sequence[int], whole: Sequence[int]) -> Any:
    """Return a share in percent of POPE's counts, summed over its categories: TP, FP, TN and FN are 0 to 3."""

    def value(counts: np.ndarray) -> np.ndarray:
        sums = counts.reshape(*counts.shape[:-1], len(pope.CATEGORIES), 4).sum(axis=-2)
        return 100 * share(sums[..., list(part)].sum(axis=-1), sums[..., list(whole)].sum(axis=-1))

    return value


# CHAIR's counts are 1 and those of `Count`: captions, wrong, named, invented, known, found, words.
RATES: dict[str, tuple[Rate, ...]] = {
    "chair": (
        *(Rate(metric.name, f"{metric.name} (%)", metric.value) for metric in chair.METRICS),
        Rate("length", "words of a caption", lambda counts: share(counts[..., 6], counts[..., 0])),
    ),
    "pope": (
        Rate("yes_ratio", "answers that are yes (%)", _pope((0, 1), (0, 1, 2, 3))),
        Rate("false_positives", "absent objects called present (%)", _pope((1,), (1, 2))),
        Rate("false_negatives", "present objects called absent (%)", _pope((3,), (0, 3))),
        Rate("accuracy", "accuracy (%)", _pope((0, 2), (0, 1, 2, 3))),
    ),
}
TALLIES = {"chair": chair.tally, "pope": pope.tally}


class Hallucination:
    """Reads finished evaluations.

    Args:
        runs: their folders.
        kinds: methods that count as attention- or diversity-based, beside :data:`KINDS`.
        allow: fields in which they may differ, as of ``prunetune compare``.

    Raises:
        TaskError: if one can't be read, was edited, or they are not on the same questions and weights; if none is on
            POPE or CHAIR.
    """

    def __init__(self, runs: Sequence[str | Path], kinds: Mapping[str, str], allow: Sequence[str] = ()) -> None:
        self.arms = [read_arm(run) for run in runs]
        check_comparable(self.arms, check_allowed(allow))
        self.kinds = {**KINDS, **kinds}
        self.tasks = [name for name in RATES if name in self.arms[0].answers]
        if not self.tasks:
            own = ", ".join(self.arms[0].answers)
            raise TaskError(
                f"the runs are on {own}, and invented objects are counted on {' and '.join(RATES)}; evaluate on one of "
                "them"
            )

    def record(self) -> list[dict[str, Any]]:
        """Return which runs were read, with the hashes of their results."""
        return [{"folder": str(arm.folder), "results_hash": arm.manifest.results_hash} for arm in self.arms]

    def kind(self, arm: EvaluatedArm) -> str:
        """Return what an arm counts as: dense, attention, diversity or other."""
        return "dense" if arm.dense else self.kinds.get(arm.pruner, "other")

    def label(self, arm: EvaluatedArm) -> str:
        """Return what tables and figures call an arm."""
        return arm.label if arm.pruner == "identity" else f"{arm.label}, {arm.kept:.0f}"

    def write(self, folder: Path) -> Part:
        """Write tables and figures."""
        part = Part("Hallucination: attention against diversity")
        for task in self.tasks:
            tallies = [TALLIES[task](arm.answers[task]) for arm in self.arms]
            drawn_counts = resampled(tallies)
            found = {rate.name: self._of_arms(rate, tallies, drawn_counts) for rate in RATES[task]}
            write_table(folder / f"hallucination_{task}.csv", _COLUMNS, self._rows(task, found, tallies))
            groups = list(self._groups(task, tallies, drawn_counts))
            write_table(folder / f"hallucination_{task}_differences.csv", _DIFFERENCES, groups)
            part.tables[f"hallucination_{task}.csv"] = "rates of each run with 95 % intervals; pictures are drawn"
            part.tables[f"hallucination_{task}_differences.csv"] = (
                "paired differences: of each run to the dense one, and at each budget of the mean of "
                "diversity-based methods to that of attention-based ones"
            )
            part.figures.append(self._draw(folder, task, found, len(tallies[0].units)))
            for row in groups:
                if row["first"].startswith(DIVERSE):
                    ends = "" if row["low"] is None else f" [{row['low']:+.1f}, {row['high']:+.1f}]"
                    budget = row["first"].removeprefix(f"{DIVERSE}, ")
                    part.remarks.append(
                        f"{task}, {row['rate']} at {budget}: diversity-based less attention-based methods "
                        f"{row['difference']:+.1f}{ends}."
                    )
        return part

    def _of_arms(self, rate: Rate, tallies: Sequence[Tally], drawn_counts: np.ndarray) -> list[Estimate]:
        """Return a rate of every arm with its interval."""
        found = []
        for number, tally in enumerate(tallies):
            value = float(rate.value(tally.counts.sum(axis=0)))
            found.append(Estimate(value, *(interval(rate.value(drawn_counts[:, number])) or (None, None))))
        return found

    def _rows(
        self, task: str, found: Mapping[str, list[Estimate]], tallies: Sequence[Tally]
    ) -> Iterator[Mapping[str, Any]]:
        for number, arm in enumerate(self.arms):
            for name, estimates in found.items():
                own = estimates[number]
                yield {"task": task, "run": str(arm.folder), "arm": self.label(arm), "kind": self.kind(arm),
                       "kept": arm.kept, "pictures": len(tallies[number].units), "rate": name, "value": own.value,
                       "low": own.low, "high": own.high}  # fmt: skip

    def _groups(self, task: str, tallies: Sequence[Tally], drawn_counts: np.ndarray) -> Iterator[dict[str, Any]]:
        """Yield paired differences: the arms of a difference are drawn together."""
        dense = [number for number, arm in enumerate(self.arms) if self.kind(arm) == "dense"]
        pairs: list[tuple[str, str, list[int], list[int]]] = []
        for number, arm in enumerate(self.arms):
            if dense and number not in dense:
                pairs.append((self.label(arm), self.label(self.arms[dense[0]]), [number], dense[:1]))
        for budget in dict.fromkeys(arm.budget for arm in self.arms):
            diverse, attentive = (self._training_free(kind, budget) for kind in ("diversity", "attention"))
            if diverse and attentive:
                pairs.append((f"{DIVERSE}, {budget}", f"attention (mean), {budget}", diverse, attentive))
        for rate in RATES[task]:
            values = np.array([float(rate.value(tally.counts.sum(axis=0))) for tally in tallies])
            resamples = np.stack([rate.value(drawn_counts[:, number]) for number in range(len(tallies))], axis=1)
            for first, second, one, other in pairs:
                difference = values[one].mean() - values[other].mean()
                ends = interval(resamples[:, one].mean(axis=1) - resamples[:, other].mean(axis=1)) or (None, None)
                yield {"task": task, "rate": rate.name, "first": first, "second": second,
                       "difference": float(difference), "low": ends[0], "high": ends[1]}  # fmt: skip

    def _named(self, arm: EvaluatedArm) -> str:
        """Return an arm's label with its kind."""
        return self.label(arm) if arm.dense else f"{self.label(arm)} ({self.kind(arm)})"

    def _training_free(self, kind: str, budget: str) -> list[int]:
        """Return the arms of a kind at a budget with the base's projector: a tuned one has another."""
        found = []
        for number, arm in enumerate(self.arms):
            if self.kind(arm) == kind and arm.budget == budget and not arm.tuned:
                found.append(number)
        return found

    def _draw(self, folder: Path, task: str, found: Mapping[str, list[Estimate]], pictures: int) -> Figure:
        order = sorted(range(len(self.arms)), key=lambda number: ORDER.index(self.kind(self.arms[number])))
        rates = RATES[task]
        size = (1.6 + 1.9 * len(rates), 1.5 + 0.26 * len(order))
        title = f"Invented objects on {task.upper()}, {pictures} pictures"
        with drawn(folder, f"hallucination_{task}", title, size, columns=len(rates)) as axes:
            for place, rate in zip(axes[0], rates, strict=True):
                for row, number in enumerate(order):
                    kind = ORDER.index(self.kind(self.arms[number]))
                    how: dict[str, Any] = {"color": COLORS[(6, 0, 5, 2)[kind]], "marker": MARKERS[kind]}
                    whiskers(place, [row], [found[rate.name][number]], **how)
                names = [self._named(self.arms[number]) for number in order]
                place.set_yticks(range(len(order)), names if place is axes[0][0] else [""] * len(order))
                place.set_ylim(len(order) - 0.5, -0.5)
                place.set_xlabel(rate.about)
                place.grid(axis="x", alpha=0.3)
        return Figure(
            f"hallucination_{task}",
            title,
            f"Each run over {pictures} pictures with 95 % bootstrap intervals, pictures drawn; circles are dense, "
            "squares attention-based, triangles diversity-based methods, diamonds others.",
        )


_COLUMNS = ("task", "run", "arm", "kind", "kept", "pictures", "rate", "value", "low", "high")
_DIFFERENCES = ("task", "rate", "first", "second", "difference", "low", "high")
