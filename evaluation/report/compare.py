"""Dense, training-free and tuned arms side by side, with paired intervals; refuses arms that can't be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.metrics.averages import average
from prunetune.evaluation.metrics.intervals import bootstrap_interval
from prunetune.evaluation.report.arms import EvaluatedArm, read_arm
from prunetune.models.code import told
from prunetune.models.seal import short
from prunetune.pruning import PruningSpec

# What may differ between arms of one table. Within a tuned arm and its training-free twin only the projector may.
# Everything else that is in a manifest moves numbers: the batch size and the image processor in their last bits, which
# decide between two tokens of half precision, and with them between two answers.
_ARM = {"projector", "pruning", "profile", "plugins", "text_tower_hash"}


@dataclass(frozen=True)
class Row:
    """One line of the table; accuracies in percent, ``gain`` is tuned minus training-free in points.

    Attributes:
        label: method, options that are set, and whether it is tuned.
        kept: mean number of visual tokens that reached the LLM.
        per_source: accuracy by source.
        overall: accuracy over all items.
        interval: its 95 % bootstrap interval.
        relative: accuracy in percent of the dense arm's; None without a dense arm that gets anything right.
        gain: a tuned arm's accuracy minus its twin's.
        gain_interval: its 95 % interval, paired: both arms' scores of an image are drawn together.
        facts: what a reader needs to know of how the row came about.
    """

    label: str
    kept: float
    per_source: dict[str, float]
    overall: float
    interval: tuple[float, float]
    relative: float | None
    gain: float | None
    gain_interval: tuple[float, float] | None
    facts: dict[str, Any] = field(default_factory=dict)


def compare(folders: Sequence[str | Path], seed: int = 0, hard_for: str | Path | None = None) -> list[Row]:
    """Return the rows of the comparison: dense first, then by budget and method, tuned below its twin.

    Args:
        folders: finished arms.
        seed: seed of the bootstrap, which resamples images, since questions about one image hang together.
        hard_for: an arm of the ``downsample`` baseline; only items that it gets wrong are compared (the idea of
            VTC-Bench, arXiv 2510.07143: the others are answered by a smaller image as well).

    Raises:
        TaskError: if the arms can't be compared.
    """
    arms = [read_arm(folder) for folder in folders]
    if not arms:
        raise TaskError("name at least one evaluated arm")
    check_comparable(arms)
    if hard_for is not None:
        arms = _hard_part(arms, read_arm(hard_for))
    dense = None
    for arm in arms:
        # Of the items that are compared: with a difficulty filter the dense arm has fewer right as well.
        if arm.dense and dense is None:
            dense = arm.average().overall
    return [_row(arm, arms, dense, seed) for arm in sorted(arms, key=_order)]


def _row(arm: EvaluatedArm, arms: list[EvaluatedArm], dense: float | None, seed: int) -> Row:
    mean = arm.average()
    assert mean.overall is not None  # read_arm refuses arms without scores
    gain = gain_interval = None
    twin = _twin(arm, arms) if arm.tuned else None
    if twin is not None:
        # Question by question: what both arms find hard cancels out, and the interval is that of the difference.
        difference = arm.scores - twin.scores
        gain = average(difference.tolist(), arm.sources).overall
        gain_interval = bootstrap_interval(difference, arm.images, seed)
    return Row(
        label=arm.label,
        kept=arm.kept,
        per_source=mean.by_source,
        overall=mean.overall,
        interval=bootstrap_interval(arm.scores, arm.images, seed),
        relative=100 * mean.overall / dense if dense else None,
        gain=gain,
        gain_interval=gain_interval,
        facts=_facts(arm),
    )


def _facts(arm: EvaluatedArm) -> dict[str, Any]:
    """Return what a reader of one row needs to know of how it came about."""
    manifest = arm.manifest
    assert manifest.kept_tokens is not None  # a finished arm has them
    protocols = set()
    prompts = set()
    for task in manifest.tasks.values():
        protocols.add(task.protocol)
        prompts.add(task.prompt)
    return {
        "items": len(arm.scores),
        "kept_min": manifest.kept_tokens.min,
        "kept_max": manifest.kept_tokens.max,
        "protocol": "; ".join(sorted(protocols)),
        "prompt": "; ".join(sorted(prompts)),
        "batch_size": manifest.batch_size,
        "dtype": manifest.model.dtype,
        "model": manifest.model.path,
        # 64 bits tell arms apart; the whole hashes are in their manifests.
        "frozen_hash": manifest.frozen_hash[:16],
        "projector_hash": manifest.projector.hash[:16],
        "pruning": json.dumps(manifest.pruning.model_dump(), sort_keys=True),
        "original_projector_hash": (manifest.original_projector_hash or "")[:16],
        "adapter_hash": (manifest.projector.stored_hash or "")[:16],
        "prunetune": told(None if manifest.prunetune is None else manifest.prunetune.model_dump()),
    }


def check_comparable(arms: list[EvaluatedArm]) -> None:
    """Check that the arms answered the same questions on the same frozen weights in the same way.

    Raises:
        TaskError: naming the first field that differs, or a tuned arm without its training-free twin.
    """
    # Against the first is enough: arms that equal it in a field equal one another.
    first = arms[0]
    own = _shared(first)
    for arm in arms[1:]:
        _check_formats(first, arm)
        other = _shared(arm)
        for key in sorted({*own, *other} - _ARM):
            if own.get(key) != other.get(key):
                raise TaskError(
                    f"{first.folder} and {arm.folder} differ in {_deepest(key, own.get(key), other.get(key))}; arms "
                    "may differ in the projector and the pruning only"
                )
        # The hash of the items is the manifest's word; the rows may have been sorted since, and pairs would be wrong.
        if first.ids != arm.ids:
            raise TaskError(f"{first.folder} and {arm.folder} hold their items in different order; evaluate one again")
    for arm in arms:
        if arm.tuned:
            _check_twin(arm, arms)


def _shared(arm: EvaluatedArm) -> dict[str, Any]:
    """Return what all arms of a table must agree in."""
    values = arm.manifest.settings()
    if values.get("prunetune") is not None:
        # The source may differ between arms of one version; a tuned arm and its twin must agree in it, see below.
        values["prunetune"] = {"version": values["prunetune"]["version"]}
    return values


def _check_formats(first: EvaluatedArm, arm: EvaluatedArm) -> None:
    """Check that both arms are sealed, or neither: of one that is not, nobody knows which projector it ran with."""
    if first.manifest.format == arm.manifest.format:
        return
    older = min(first, arm, key=lambda one: one.manifest.format)
    raise TaskError(
        f"{older.folder} was evaluated by a version that did not record the base's projector (format "
        f"{older.manifest.format}), and can't be compared with arms that do; evaluate it again into another folder"
    )


def _check_twin(arm: EvaluatedArm, arms: list[EvaluatedArm]) -> None:
    """Check that a tuned arm has its training-free twin, and that one code pruned both."""
    twin = _twin(arm, arms)
    if twin is None:
        raise TaskError(
            f"the tuned arm {arm.folder} has no training-free arm with the same pruning: "
            f"{_nearest_twin(arm, arms)} differs; evaluate the same configuration without adapter and compare "
            "with that"
        )
    # Other arms may be of other methods and need no plug-in; of these two the method is the same.
    if twin.manifest.plugins != arm.manifest.plugins:
        different = {plugin.name for plugin in {*twin.manifest.plugins} ^ {*arm.manifest.plugins}}
        raise TaskError(
            f"{twin.folder} and {arm.folder} ran with different plug-ins ({', '.join(sorted(different))}); evaluate "
            "both with the same"
        )
    towers = [one.manifest.text_tower_hash for one in (twin, arm)]
    if towers[0] != towers[1]:
        raise TaskError(
            f"{twin.folder} and {arm.folder} ran with different text towers ({short(towers[0])} and "
            f"{short(towers[1])}); evaluate both with the same"
        )
    codes = [one.manifest.prunetune for one in (twin, arm)]
    if len({code.sha256 for code in codes if code is not None}) > 1:
        versions = " and ".join(told(code.model_dump()) for code in codes if code is not None)
        raise TaskError(
            f"{twin.folder} and {arm.folder} ran with different sources of prunetune: {versions}; evaluate both with "
            "the same"
        )


# What a smaller image answers as well says nothing about which tokens were kept.
def _hard_part(arms: list[EvaluatedArm], baseline: EvaluatedArm) -> list[EvaluatedArm]:
    """Return the arms with the items that the down-sampling baseline gets wrong."""
    if baseline.pruner != "downsample" or baseline.tuned:
        raise TaskError(f"{baseline.folder} is no training-free arm of downsample, which the difficulty filter needs")
    # The tuned arms were compared with these before.
    check_comparable([baseline, *(arm for arm in arms if not arm.tuned)])
    hard = baseline.scores < 0.5  # VQA accuracy knows answers that are half right
    if not hard.any():
        raise TaskError(f"{baseline.folder} answers everything, so no item is hard; use a smaller budget")
    return [arm.only(hard) for arm in arms]


def _twin(arm: EvaluatedArm, arms: list[EvaluatedArm]) -> EvaluatedArm | None:
    """Return the arm that differs from a tuned one in the projector alone."""
    # By everything that the pruning says: a twin with another option would make its effect look like tuning's.
    for other in arms:
        if not other.tuned and _unchosen(other) == _unchosen(arm):
            return other
    return None


def _unchosen(arm: EvaluatedArm) -> PruningSpec:
    """Return an arm's pruning without whose projector chooses, which is one and the same in a training-free arm."""
    return arm.manifest.pruning.model_copy(update={"choose_with": "tuned"})


def _nearest_twin(arm: EvaluatedArm, arms: list[EvaluatedArm]) -> str:
    """Return in what the training-free arm of the same method differs, or "pruning" if there is none."""
    for other in arms:
        if not other.tuned and not other.dense and other.pruner == arm.pruner:
            return _deepest("pruning", other.manifest.pruning.model_dump(), arm.manifest.pruning.model_dump())
    return "pruning"


def _order(arm: EvaluatedArm) -> tuple[bool, float, str, bool]:
    # False before True. The largest budget first, so that the table reads downwards as tokens are taken away.
    return not arm.dense, -arm.kept, arm.pruner, arm.tuned


def _deepest(key: str, one: Any, other: Any) -> str:
    """Return the path of the first difference with both values."""
    # "model differs" would leave the reader to find which of its six fields it is.
    while isinstance(one, dict) and isinstance(other, dict):
        for name in sorted({*one, *other}):
            if one.get(name) != other.get(name):
                break
        key, one, other = f"{key}.{name}", one.get(name), other.get(name)
    return f"{key} ({one!r} and {other!r})"
