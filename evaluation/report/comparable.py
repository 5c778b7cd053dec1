"""Whether arms may stand in one table: the same questions, the same frozen weights, asked in the same way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.report.arms import EvaluatedArm
from prunetune.models.code import told
from prunetune.models.seal import short
from prunetune.names import nearest
from prunetune.pruning import PruningSpec

# What may differ between arms of one table. Within a tuned arm and its training-free twin only the projector may.
# Everything else that is in a manifest moves numbers: the batch size and the image processor in their last bits, which
# decide between two tokens of half precision, and with them between two answers.
_ARM = {"projector", "pruning", "profile", "plugins", "text_tower_hash"}
ALLOWABLE = (
    "model", "settings_hash", "batch_size", "max_new_tokens", "share_prefix", "backend", "backend_options",
    "image_processor", "features", "device", "versions", "prunetune",
)  # fmt: skip
"""Fields of a manifest that may differ where somebody says so; of ``model``, ``versions`` and ``prunetune`` also parts
alone, ``versions.torch``."""
NEVER = (
    "format", "frozen_hash", "original_projector_hash", "projectors", "template_hash", "tasks", "video",
)  # fmt: skip
"""Those that nobody can allow: the format, the base's weights, the template and the questions."""


def check_allowed(names: Sequence[str]) -> list[str]:
    """Return the names of fields that may differ, commas apart, sorted.

    Raises:
        TaskError: for a name that is no field, or one that may never differ.
    """
    found = set()
    for name in (part.strip() for text in names for part in text.split(",")):
        field, _, part = name.partition(".")
        if field in NEVER:
            others = ", ".join(one for one in NEVER if one != field)
            raise TaskError(
                f"{name} may never differ between arms of one table (nor {others}): the numbers would not be of the "
                "same thing"
            )
        if field not in ALLOWABLE or (part and field not in ("model", "versions", "prunetune")):
            raise TaskError(
                f"no field {name!r} that may differ{nearest(name, ALLOWABLE)}; there are {', '.join(ALLOWABLE)}, and "
                "parts such as versions.torch and model.dtype"
            )
        found.add(name)
    return sorted(found)


def check_one_arm(first: EvaluatedArm, part: EvaluatedArm, allow: Sequence[str] = ()) -> None:
    """Check that two evaluations on different benchmarks are of one arm.

    Args:
        first: one of them.
        part: the other.
        allow: fields that may differ, see :func:`check_allowed`.

    Raises:
        TaskError: naming the first field that differs.
    """
    for name, one, other in _unequal("", _of_an_arm(first), _of_an_arm(part)):
        if not _covered(name, allow):
            hint = f"; allow it with {name}" if name.split(".")[0] in ALLOWABLE else ""
            raise TaskError(
                f"{first.folder} and {part.folder} are not of one arm: they differ in {name} ({one!r} and "
                f"{other!r}){hint}"
            )


def _of_an_arm(arm: EvaluatedArm) -> dict[str, Any]:
    """Return what evaluations of one arm on different benchmarks must agree in: no less than two arms, and the arm."""
    values = {**arm.manifest.settings(), **_shared(arm)}
    # Which frames were looked at stands there of benchmarks with videos alone, and of those nothing is kept.
    return {name: value for name, value in values.items() if name not in ("tasks", "video", "features")}


def check_comparable(arms: Sequence[EvaluatedArm], allow: Sequence[str] = ()) -> None:
    """Check that the arms answered the same questions on the same frozen weights in the same way.

    Args:
        arms: of one model.
        allow: fields that may differ, see :func:`check_allowed`.

    Raises:
        TaskError: naming the first field that differs, or a tuned arm without its training-free twin.
    """
    # Against the first is enough: arms that equal it in a field equal one another.
    first = arms[0]
    for arm in arms[1:]:
        _check_formats(first, arm)
        for name, one, other in _differences(first, arm):
            if not _covered(name, allow):
                what = f"{first.folder} and {arm.folder} differ in {name} ({one!r} and {other!r})"
                hint = f", or allow it with --allow {name}" if name.split(".")[0] in ALLOWABLE else ""
                raise TaskError(f"{what}; arms may differ in the projector and the pruning only{hint}")
        check_same_questions(first, arm)
    for arm in arms:
        if arm.tuned:
            _check_twin(arm, arms, allow)


def check_same_questions(first: EvaluatedArm, arm: EvaluatedArm) -> None:
    """Check that two arms answered the same questions in the same order; raises TaskError if not."""
    # Those of several models are compared in nothing else, but a row of other questions is another table's.
    for name in (*first.manifest.tasks, *arm.manifest.tasks):
        one, other = (side.manifest.tasks.get(name) for side in (first, arm))
        if one != other:
            raise TaskError(f"{first.folder} and {arm.folder} were asked other questions of {name}; evaluate one again")
    # The hash of the items is the manifest's word; the rows may have been sorted since, and pairs would be wrong.
    if first.ids != arm.ids:
        raise TaskError(f"{first.folder} and {arm.folder} hold their items in different order; evaluate one again")


def allowed_differences(arms: Sequence[EvaluatedArm], allow: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return how the arms differ in what may: the folders of each value, as text, by field."""
    fields = {name for arm in arms[1:] for name, _, _ in _differences(arms[0], arm) if _covered(name, allow)}
    for arm in arms:
        for cell in arm.cells:
            unequal = _unequal("", _of_an_arm(arms[0].cells[0]), _of_an_arm(cell))
            fields |= {name for name, _, _ in unequal if _covered(name, allow)}
    found: dict[str, dict[str, list[str]]] = {}
    for name in sorted(fields):
        values = found.setdefault(name, {})
        for arm in arms:
            own = [str(_part(_shared(cell), name)) for cell in arm.cells]
            if len(set(own)) == 1 or name == "features":
                values.setdefault(own[0], []).append(str(arm.folder))
                continue
            for value, cell in zip(own, arm.cells, strict=True):
                values.setdefault(value, []).append(str(cell.folder))
    return found


def distance(one: EvaluatedArm, other: EvaluatedArm) -> int:
    """Return in how many fields that all arms should agree in two arms differ."""
    return len(list(_differences(one, other)))


def _covered(name: str, allow: Sequence[str]) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in allow)


def _differences(one: EvaluatedArm, other: EvaluatedArm) -> Iterator[tuple[str, Any, Any]]:
    """Give what all arms of a table must agree in and these two do not: its path, and both values."""
    # "model differs" would leave the reader to find which of its six fields it is.
    yield from _unequal("", _shared(one), _shared(other))


def _unequal(path: str, one: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*one, *other}):
        left, right = one.get(key), other.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _unequal(f"{path}{key}.", left, right)
        elif left != right:
            yield f"{path}{key}", left, right


def _part(values: dict[str, Any], path: str) -> Any:
    found: Any = values
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _shared(arm: EvaluatedArm) -> dict[str, Any]:
    """Return what all arms of a table must agree in."""
    values = {key: value for key, value in arm.manifest.settings().items() if key not in _ARM}
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


def _check_twin(arm: EvaluatedArm, arms: Sequence[EvaluatedArm], allow: Sequence[str]) -> None:
    """Check that a tuned arm has its training-free twin, and that one code pruned both."""
    twin = twin_of(arm, arms)
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
    if not _covered("prunetune.sha256", allow):
        for one in arm.cells:
            for other in twin.cells:
                # Benchmark by benchmark: the two of one are subtracted, and of no others.
                if set(one.manifest.tasks) & set(other.manifest.tasks):
                    _check_sources(other, one)


def _check_sources(twin: EvaluatedArm, arm: EvaluatedArm) -> None:
    codes = [one.manifest.prunetune for one in (twin, arm)]
    if len({code.sha256 for code in codes if code is not None}) > 1:
        versions = " and ".join(told(code.model_dump()) for code in codes if code is not None)
        raise TaskError(
            f"{twin.folder} and {arm.folder} ran with different sources of prunetune: {versions}; evaluate both with "
            "the same, or allow it with --allow prunetune"
        )


def twin_of(arm: EvaluatedArm, arms: Sequence[EvaluatedArm]) -> EvaluatedArm | None:
    """Return the arm that differs from a tuned one in the projector alone."""
    own = unchosen(arm.manifest.pruning)
    # By everything that the pruning says: a twin with another option would make its effect look like tuning's.
    twins = [other for other in arms if not other.tuned and unchosen(other.manifest.pruning) == own]
    # Of several, where some field may differ, the one that ran most alike: on the same device, say.
    return min(twins, key=lambda other: distance(arm, other), default=None)


def unchosen(pruning: PruningSpec) -> PruningSpec:
    """Return a pruning without whose projector chooses, which is one and the same in a training-free arm."""
    return pruning.model_copy(update={"choose_with": "tuned"})


def _nearest_twin(arm: EvaluatedArm, arms: Sequence[EvaluatedArm]) -> str:
    """Return in what the training-free arm of the same method differs, or "pruning" if there is none."""
    for other in arms:
        if not other.tuned and not other.dense and other.method == arm.method:
            one, two = other.manifest.pruning.model_dump(), arm.manifest.pruning.model_dump()
            for name, left, right in _unequal("pruning.", one, two):
                return f"{name} ({left!r} and {right!r})"
    return "pruning"
