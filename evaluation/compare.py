"""Dense, training-free and tuned arms in one table, with paired intervals; refuses arms that can't be compared."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from prunetune.evaluation.intervals import bootstrap_interval
from prunetune.evaluation.quoted import Quoted
from prunetune.evaluation.results import read_manifest, read_results
from prunetune.evaluation.tasks import TaskError

# What may differ between arms of one table. Within a tuned arm and its training-free twin only the projector may.
_ARM = {"projector", "pruning", "kept_tokens", "items_per_second", "metrics"}


@dataclass(frozen=True)
class Arm:
    """A finished evaluation: manifest, and id, source, picture and score of every item in order, each (M,)."""

    folder: Path
    manifest: dict[str, Any]
    ids: list[str]
    sources: np.ndarray
    images: np.ndarray
    scores: np.ndarray

    @property
    def dense(self) -> bool:
        """Whether nothing is pruned and the projector is the base's."""
        return self.manifest["pruning"]["pruner"] == "identity" and not self.tuned

    @property
    def tuned(self) -> bool:
        """Whether the projector comes from a recalibration."""
        return self.manifest["projector"]["adapter"] is not None

    @property
    def label(self) -> str:
        """Method, options that are set, and whether it is tuned."""
        pruning = self.manifest["pruning"]
        options = ", ".join(f"{key}={value}" for key, value in pruning["options"].items())
        name = "dense" if pruning["pruner"] == "identity" else pruning["pruner"]
        return f"{name}{f' ({options})' if options else ''}{self._tuned_for() if self.tuned else ''}"

    def _tuned_for(self) -> str:
        """Return " + tuned projector", and for which pruning if that is another than the arm's."""
        target, own = self.manifest["projector"]["tuned_for"], self.manifest["pruning"]
        other = "" if target == own else f" (for {target['pruner']}, {target['keep']})"
        return f" + tuned projector{other}"


@dataclass(frozen=True)
class Row:
    """One line of the table; accuracies in percent, ``gain`` is tuned minus training-free in points."""

    label: str
    kept: float
    per_source: dict[str, float]
    overall: float
    interval: tuple[float, float]
    relative: float | None
    gain: float | None
    gain_interval: tuple[float, float] | None
    facts: dict[str, Any] = field(default_factory=dict)


def read_arm(folder: str | Path) -> Arm:
    """Read a finished arm; raises TaskError if it is missing, unfinished or short of rows."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    rows = read_results(folder)
    expected = sum(task["items"] for task in manifest["tasks"].values())
    if len(rows) != expected:
        raise TaskError(f"{folder} has {len(rows)} results, its manifest says {expected}; evaluate it again")
    hidden = sorted({row["task"] for row in rows if row["score"] is None})
    if hidden:
        raise TaskError(
            f"{folder}: {', '.join(hidden)} has no score per item (hidden answers, or a score of the whole set); "
            "see its upload file or the metrics in manifest.json"
        )
    many = len(manifest["tasks"]) > 1
    sources = [f"{row['task']}/{row['source']}" if many else row["source"] for row in rows]
    return Arm(
        folder,
        manifest,
        [f"{row['task']}/{row['id']}" for row in rows],
        np.array(sources),
        np.array([str(row["image"] or row["id"]) for row in rows]),
        np.array([row["score"] for row in rows], dtype=float),
    )


def check_comparable(arms: list[Arm]) -> None:
    """Check that the arms answered the same questions on the same frozen weights in the same way.

    Raises:
        TaskError: naming the first field that differs, or a tuned arm without its training-free twin.
    """
    first = arms[0]
    for arm in arms[1:]:
        for key in sorted({*first.manifest, *arm.manifest} - _ARM):
            one, other = first.manifest.get(key), arm.manifest.get(key)
            if one != other:
                raise TaskError(
                    f"{first.folder} and {arm.folder} differ in {_deepest(key, one, other)}; arms may "
                    "differ in the projector and the pruning only"
                )
        if first.ids != arm.ids:
            raise TaskError(f"{first.folder} and {arm.folder} hold their items in different order; evaluate one again")
    for arm in arms:
        if arm.tuned and _twin(arm, arms) is None:
            others = [other for other in arms if not other.tuned and not other.dense]
            near = next((o for o in others if _pruner(o) == _pruner(arm)), None)
            what = _deepest("pruning", near.manifest["pruning"], arm.manifest["pruning"]) if near else "pruning"
            raise TaskError(
                f"the tuned arm {arm.folder} has no training-free arm with the same pruning: {what} differs; "
                "evaluate the same configuration without adapter and compare with that"
            )


def compare(folders: list[str | Path], seed: int = 0, hard_for: str | Path | None = None) -> list[Row]:
    """Return the rows of the comparison: dense first, then by budget and method, tuned below its twin.

    Args:
        folders: finished arms.
        seed: seed of the bootstrap, which resamples pictures, since questions about one picture hang together.
        hard_for: an arm of the ``downsample`` baseline; only items that it gets wrong are compared (the idea of
            VTC-Bench, arXiv 2510.07143: the others are answered by a smaller picture as well).

    Raises:
        TaskError: if the arms can't be compared.
    """
    arms = [read_arm(folder) for folder in folders]
    if not arms:
        raise TaskError("name at least one evaluated arm")
    check_comparable(arms)
    if hard_for is not None:
        arms = _hard_part(arms, read_arm(hard_for))
    dense = next((arm for arm in arms if arm.dense), None)
    rows = []
    for arm in sorted(arms, key=_place):
        twin = _twin(arm, arms) if arm.tuned else None
        rows.append(
            Row(
                label=arm.label,
                kept=arm.manifest["kept_tokens"]["mean"],
                per_source={str(s): 100 * arm.scores[arm.sources == s].mean() for s in np.unique(arm.sources)},
                overall=100 * arm.scores.mean(),
                interval=bootstrap_interval(arm.scores, arm.images, seed),
                relative=100 * arm.scores.mean() / dense.scores.mean()
                if dense is not None and dense.scores.any()
                else None,
                gain=100 * (arm.scores - twin.scores).mean() if twin is not None else None,
                gain_interval=bootstrap_interval(arm.scores - twin.scores, arm.images, seed)
                if twin is not None
                else None,
                facts=_facts(arm),
            )
        )
    return rows


def _hard_part(arms: list[Arm], baseline: Arm) -> list[Arm]:
    """Return the arms with the items that the down-sampling baseline gets wrong."""
    if _pruner(baseline) != "downsample" or baseline.tuned:
        raise TaskError(f"{baseline.folder} is no training-free arm of downsample, which the difficulty filter needs")
    check_comparable([baseline, *[arm for arm in arms if not arm.tuned]])
    hard = baseline.scores < 0.5
    if not hard.any():
        raise TaskError(f"{baseline.folder} answers everything, so no item is hard; use a smaller budget")
    return [
        replace(arm, ids=[i for i, h in zip(arm.ids, hard, strict=True) if h], sources=arm.sources[hard],
                images=arm.images[hard], scores=arm.scores[hard])
        for arm in arms
    ]  # fmt: skip


def _facts(arm: Arm) -> dict[str, Any]:
    """Return what a reader of one row needs to know of how it came about."""
    manifest = arm.manifest
    tasks = manifest["tasks"].values()
    return {
        "items": len(arm.scores),
        "kept_min": manifest["kept_tokens"]["min"],
        "kept_max": manifest["kept_tokens"]["max"],
        "protocol": "; ".join(sorted({task["protocol"] for task in tasks})),
        "prompt": "; ".join(sorted({task["prompt"] for task in tasks})),
        "batch_size": manifest["batch_size"],
        "dtype": manifest["model"]["dtype"],
        "model": manifest["model"]["path"],
        "frozen_hash": manifest["frozen_hash"][:16],
        "projector_hash": manifest["projector"]["hash"][:16],
        "pruning": json.dumps(manifest["pruning"], sort_keys=True),
    }


def to_markdown(rows: list[Row], quoted: Sequence[Quoted] = ()) -> str:
    """Return the table as Markdown, quoted rows at its end."""
    header, body = _cells(rows)
    for row in quoted:
        cells = [f"{row.values[name]:g}" if name in row.values else "" for name in header[2:-3]]
        body.append([row.label, f"{row.kept:g}", *cells, "", "", ""])
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def to_csv(rows: list[Row], quoted: Sequence[Quoted] = ()) -> str:
    """Return the table as CSV with plain numbers and every fact of a row; quoted rows say where they are from."""
    text = io.StringIO()
    writer = csv.writer(text)
    sources = list(rows[0].per_source)
    writer.writerow(
        [
            "arm",
            "kept_tokens",
            *sources,
            "overall",
            "overall_low",
            "overall_high",
            "relative_to_dense",
            "tuned_minus_training_free",
            "gain_low",
            "gain_high",
            *rows[0].facts,
            "quoted",
        ]
    )
    for row in rows:
        gain = row.gain_interval or (None, None)
        values = [
            row.kept,
            *(row.per_source[s] for s in sources),
            row.overall,
            *row.interval,
            row.relative,
            row.gain,
            *gain,
        ]
        numbers = ["" if value is None else f"{value:.4f}" for value in values]
        writer.writerow([row.label, *numbers, *row.facts.values(), ""])
    for line in quoted:
        cells = [line.values.get(name, "") for name in [*sources, "overall"]]
        writer.writerow([line.arm, line.kept, *cells, *[""] * (6 + len(rows[0].facts)), line.cite])
    return text.getvalue()


def _cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    sources = list(rows[0].per_source)
    header = ["arm", "visual tokens", *sources, "overall", "95 % interval", "of dense", "tuned - training-free"]
    body = []
    for row in rows:
        gain = ""
        if row.gain is not None and row.gain_interval is not None:
            gain = f"**{row.gain:+.1f}** [{row.gain_interval[0]:+.1f}, {row.gain_interval[1]:+.1f}]"
        body.append(
            [
                row.label,
                f"{row.kept:g}",
                *(f"{row.per_source[s]:.1f}" for s in sources),
                f"{row.overall:.1f}",
                f"[{row.interval[0]:.1f}, {row.interval[1]:.1f}]",
                f"{row.relative:.1f} %" if row.relative is not None else "",
                gain,
            ]
        )
    return header, body


def _pruner(arm: Arm) -> str:
    return arm.manifest["pruning"]["pruner"]


def _twin(arm: Arm, arms: list[Arm]) -> Arm | None:
    """Return the arm that differs from a tuned one in the projector alone."""
    return next((a for a in arms if not a.tuned and a.manifest["pruning"] == arm.manifest["pruning"]), None)


def _place(arm: Arm) -> tuple:
    return (not arm.dense, -arm.manifest["kept_tokens"]["mean"], _pruner(arm), arm.tuned)


def _deepest(key: str, one: Any, other: Any) -> str:
    """Return the path of the first difference with both values."""
    while isinstance(one, dict) and isinstance(other, dict):
        part = next(name for name in sorted({*one, *other}) if one.get(name) != other.get(name))
        key, one, other = f"{key}.{part}", one.get(part), other.get(part)
    return f"{key} ({one!r} and {other!r})"
