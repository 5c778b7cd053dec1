"""Rows to be: arms, or one arm over several trainings, named so that no two are taken for each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.report.arms import EvaluatedArm
from prunetune.evaluation.report.comparable import twin_of
from prunetune.evaluation.report.parts import read_tasks
from prunetune.evaluation.report.places import relative_names
from prunetune.models.record import portable


@dataclass(frozen=True)
class ArmRuns:
    """One row: a finished evaluation, or several that differ in the training of their projector alone.

    Attributes:
        label: the row's; empty is the method, its options that are set, and which projector.
        folders: of the evaluations, one for each training (another ``train.seed``, say); or several, where benchmarks
            were evaluated into a folder each.
        model: what the table calls the model; empty is its path. Rows of one checkpoint under two names (in two
            dtypes, say) are rows of two models.
        method: what the table calls the method with its options, in a label that is not given; whose projector it is
            stands behind.
    """

    label: str
    folders: Sequence[str | Path | Sequence[str | Path]]
    model: str = ""
    method: str = ""


@dataclass(frozen=True)
class Entry:
    """A row before its numbers.

    Attributes:
        arms: one, or one for each training.
        label: tells it from all other rows of its model and budget.
        model: which model.
        id: tells it from all rows.
        places: of its arms among all arms of the table.
    """

    arms: tuple[EvaluatedArm, ...]
    label: str
    model: str
    id: str = ""
    places: list[int] = field(default_factory=list)

    @property
    def first(self) -> EvaluatedArm:
        """Its first arm, which the others equal in everything but the projector."""
        return self.arms[0]


def read_entries(runs: Sequence[ArmRuns | str | Path], rescore: bool = False, allow: Sequence[str] = ()) -> list[Entry]:
    """Read the arms of all rows, in the order in which they are named.

    Raises:
        TaskError: for an arm that can't be read or is named twice, or arms that can't be one row.
    """
    if not runs:
        raise TaskError("name at least one evaluated arm")
    seen: dict[Path, str] = {}
    entries = []
    for run in runs:
        one = run if isinstance(run, ArmRuns) else ArmRuns("", [run])
        if not one.folders:
            raise TaskError(f"the row {one.label!r} names no folder; name at least one evaluated arm")
        places = parts_of(one)
        for folder in (folder for parts in places for folder in parts):
            if folder.resolve() in seen:
                raise TaskError(f"{folder} is named twice (as {seen[folder.resolve()]}); name every arm once")
            seen[folder.resolve()] = str(folder)
        arms = tuple(read_tasks(parts, rescore, allow) for parts in places)
        _check_trainings(arms)
        # Without the folders of any machine.
        model = one.model or portable(arms[0].manifest.model.path) or ""
        entries.append(Entry(arms, one.label or arms[0].labelled(one.method), model))
    return entries


def parts_of(run: ArmRuns) -> list[list[Path]]:
    """Return the folders of a row's evaluations: a list for each training, of one folder or one a benchmark."""
    found = []
    for folder in run.folders:
        parts = [folder] if isinstance(folder, str | Path) else folder
        found.append([Path(part) for part in parts])
    return found


def _check_trainings(arms: Sequence[EvaluatedArm]) -> None:
    """Check that several arms are one setting, trained several times; raises TaskError if not."""
    first = arms[0]
    hashes = {first.manifest.projector.hash: first.folder}
    for arm in arms[1:]:
        if not (first.tuned and arm.tuned):
            raise TaskError(
                f"{first.folder} and {arm.folder} can't be one row: only arms with a recalibrated projector are "
                "averaged over trainings"
            )
        one, other = first.manifest, arm.manifest
        for name, left, right in (
            ("model", one.model, other.model),
            ("pruning", one.pruning, other.pruning),
            ("projector.tuned_for", one.projector.tuned_for, other.projector.tuned_for),
            ("projector.elastic", one.projector.elastic, other.projector.elastic),
            ("projector.strength", one.projector.strength, other.projector.strength),
            ("projector.soup", one.projector.soup, other.projector.soup),
        ):
            if left != right:
                raise TaskError(f"{first.folder} and {arm.folder} can't be one row: they differ in {name}")
        if other.projector.hash in hashes:
            same = hashes[other.projector.hash]
            raise TaskError(f"{same} and {arm.folder} ran with the same projector; name every training once")
        hashes[other.projector.hash] = arm.folder


def named(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries in the table's order, with labels and ids of their own.

    Two that are described alike get the folder of their adapter's run behind it, or what else tells them apart; in all
    rows of that label, so that one projector has one label at every budget. Model by model dense comes first, then by
    budget and method, tuned below its twin.
    """
    found = sorted([_distinct(entry, entries) for entry in entries], key=lambda entry: _order(entry, entries))
    if len({entry.model for entry in entries}) > 1:
        found = [replace(entry, label=f"{entry.model}: {entry.label}") for entry in found]
    taken: dict[str, int] = {}
    arms = 0
    with_ids = []
    for entry in found:
        text = f"{entry.label} {entry.first.budget}"
        name = "-".join("".join(mark if mark.isalnum() or mark in ".%" else " " for mark in text).split())
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:  # labels that differ in punctuation alone
            name = f"{name}-{taken[name]}"
        with_ids.append(replace(entry, id=name, places=list(range(arms, arms + len(entry.arms)))))
        arms += len(entry.arms)
    return with_ids


def _order(entry: Entry, entries: Sequence[Entry]) -> tuple[int, bool, float, str, bool, str]:
    models = list(dict.fromkeys(other.model for other in entries))
    arm = entry.first
    # Of methods that decide by the image, a tuned arm may keep other numbers than its twin, and stands below it.
    twin = twin_of(arm, [other.first for other in entries if other.model == entry.model]) if arm.tuned else None
    kept = arm.tokens if twin is None else twin.tokens
    # False before True. The largest budget first, so that the table reads downwards as tokens are taken away.
    return models.index(entry.model), not arm.dense, -kept, arm.method, arm.tuned, entry.label


def _distinct(entry: Entry, entries: Sequence[Entry]) -> Entry:
    """Return the entry with what tells it from others of its label, if there is a pair of those at one budget."""
    alike = [other for other in entries if (other.model, other.label) == (entry.model, entry.label)]
    budgets = [other.first.budget for other in alike]
    if len(set(budgets)) == len(budgets):
        return entry
    for tell in (_adapter, _pruning, _device, _hash, _folder):
        told = [tell(other) for other in alike]
        # Whatever is told must do so for all pairs at one budget.
        if len(set(zip(budgets, told, strict=True))) == len(alike):
            return replace(entry, label=f"{entry.label} [{tell(entry)}]") if tell(entry) else entry
    names = relative_names([other.first.folder for other in alike])
    (name,) = [name for other, name in zip(alike, names, strict=True) if other is entry]
    return replace(entry, label=f"{entry.label} [{name}]")


def _adapter(entry: Entry) -> str:
    if len(entry.arms) > 1:
        return f"{len(entry.arms)} trainings"
    return entry.first.adapter if entry.first.tuned else ""


def _pruning(entry: Entry) -> str:
    """Return the settings of the pruning that a label does not have."""
    own = entry.first.manifest.pruning.model_dump(exclude={"pruner", "keep", "options", "choose_with", "stages"})
    default = type(entry.first.manifest.pruning)().model_dump()
    for key in ("text_tower", "profile"):
        if own.get(key) is not None:
            own[key] = portable(own[key])
    return ", ".join(f"{key} {value}" for key, value in own.items() if value != default.get(key))


def _device(entry: Entry) -> str:
    return entry.first.manifest.device


def _hash(entry: Entry) -> str:
    return entry.first.manifest.projector.hash[:8]


def _folder(entry: Entry) -> str:
    return entry.first.folder.name
