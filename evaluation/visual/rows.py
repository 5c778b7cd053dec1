"""The rows of the grid: each method with the base's projector, and with one that was recalibrated for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from prunetune.configs import ConfigError, ShownMethod, VisualizeConfig
from prunetune.models import Arm, CheckpointError, read_record
from prunetune.pruning import PruningSpec
from prunetune.pruning.budget import Budget, check_budget
from prunetune.pruning.registry import build_pruner
from prunetune.pruning.text import TextReader


@dataclass(frozen=True)
class Row:
    """A row of the grid.

    Attributes:
        label: what it is called.
        method: as it is configured.
        budgets: its columns.
        spec: with the first of its budgets.
        adapter: folder of its projector; None is the base's own.
        tuned_for: the pruning that its projector was recalibrated for.
    """

    label: str
    method: ShownMethod
    budgets: tuple[Budget, ...]
    spec: PruningSpec
    adapter: str | None = None
    tuned_for: dict[str, Any] | None = None

    def at(self, budget: Budget) -> PruningSpec:
        """Return the pruning of one of its cells."""
        return self.spec.model_copy(update={"keep": budget})


def rows_of(config: VisualizeConfig) -> list[Row]:
    """Return the rows; nothing of the model is needed yet.

    Raises:
        ConfigError: for fields of `pruning` that are none.
        PruningError: for unknown methods, options and budgets.
        CheckpointError: for an adapter that can't be read, or of another method.
    """
    rows = []
    for method in config.methods:
        budgets = tuple(config.budgets if method.budgets is None else method.budgets)
        if not budgets:
            raise ConfigError(f"methods: {method.label} has no budgets; name at least one, or leave them out")
        for budget in budgets:
            check_budget(budget)
        spec = _spec(config, method, budgets[0])
        build_pruner(spec.pruner, spec.options)  # a wrong option stops here, before gigabytes are read
        rows.append(Row(method.label, method, budgets, spec))
        if method.adapter is not None:
            tuned_for = _tuned_for(method, method.adapter)
            rows.append(Row(f"{method.label}, tuned", method, budgets, spec, method.adapter, tuned_for))
    return rows


def columns_of(rows: Sequence[Row]) -> list[Budget]:
    """Return the budgets of all rows, each once and in the order in which they come."""
    found: list[Budget] = []
    for row in rows:
        for budget in row.budgets:
            if not any(_same(budget, other) for other in found):
                found.append(budget)
    return found


def _same(one: Budget, other: Budget) -> bool:
    return one == other and type(one) is type(other)  # 1 is one token and 1.0 are all


def _spec(config: VisualizeConfig, method: ShownMethod, budget: Budget) -> PruningSpec:
    values = {**config.pruning, **method.pruning, "pruner": method.pruner, "keep": budget, "options": method.options}
    try:
        return PruningSpec.model_validate(values)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ConfigError(f"methods: {method.label}: {told}") from None


def _tuned_for(method: ShownMethod, adapter: str) -> dict[str, Any]:
    """Return the pruning that an adapter was recalibrated for.

    Raises:
        CheckpointError: if it is of another method, and no elastic one, which is meant for several.
    """
    record = read_record(adapter)
    tuned_for: dict[str, Any] = record.get("pruning") or {}
    pruner = tuned_for.get("pruner")
    if pruner != method.pruner and not record.get("elastic"):
        raise CheckpointError(
            f"projector {adapter} was recalibrated for {pruner}, and the method is {method.pruner}; give it to "
            f"{pruner}, or take one that was recalibrated for {method.pruner} or is elastic"
        )
    return tuned_for


def arms_of(rows: Sequence[Row], loaded: Arm) -> list[Arm]:
    """Return an arm for each row, all of which share the model's weights; one adapter is read once."""
    by_adapter: dict[str | None, Arm] = {None: loaded}
    arms = []
    for row in rows:
        if row.adapter not in by_adapter:
            by_adapter[row.adapter] = loaded.with_adapter(row.adapter)
        arms.append(by_adapter[row.adapter].with_pruning(row.spec))
    _share_text_towers(arms)
    return arms


def _share_text_towers(arms: Sequence[Arm]) -> None:
    """Let arms of one text tower read with one copy of it: nothing that is tuned is in it, and the others are freed."""
    readers: dict[str | None, TextReader] = {}
    for arm in arms:
        if arm.pruned.reads_text_tower:
            arm.pruned.text = readers.setdefault(arm.spec.text_tower, arm.pruned.text)
