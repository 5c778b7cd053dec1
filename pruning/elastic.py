"""A model whose pruner and budget are another for every row of a batch, to train one projector over many of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunetune.pruning.budget import Budget, BudgetRule
from prunetune.pruning.choosing import Choosing
from prunetune.pruning.errors import PruningError
from prunetune.pruning.plug import PrunedModel
from prunetune.pruning.rewrite import Chosen
from prunetune.pruning.spec import PruningSpec
from prunetune.pruning.stages.plan import Plan
from prunetune.pruning.stages.schedule import Schedule
from prunetune.pruning.vision import Vision


class ElasticModel(PrunedModel):
    """Prunes every row of a batch in a setting of its own, and a batch without settings as ``spec`` says.

    A batch has ``cells``, for each row the number of its setting. Its images are encoded once, with what any of the
    methods reads; what is kept of an image is what a :class:`PrunedModel` of its setting alone would keep.

    Args:
        model: as of :class:`PrunedModel`.
        spec: the setting of batches without ``cells``.
        settings: what else rows may be pruned by; they differ from ``spec`` in pruner, options and budget alone. Their
            stages have the places of ``spec``'s and budgets of their own, or there are none.
        tokenizer: as of :class:`PrunedModel`.
        original: as of :class:`PrunedModel`.

    Attributes:
        settings: the pruner and budget of each number.
        parts: a pruned model of each setting.

    Raises:
        PruningError: if the model does not offer what one of the pruners reads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: PruningSpec,
        settings: Sequence[PruningSpec],
        tokenizer: PreTrainedTokenizerBase | None = None,
        original: PreTrainedModel | None = None,
    ) -> None:
        self.settings = tuple(settings)
        super().__init__(model, spec, tokenizer, original)
        self.parts: list[PrunedModel] = []
        for setting in self.settings:
            _check_alike(spec, setting)
            self.parts.append(PrunedModel(model, setting, tokenizer, original, self.text))
        self._schedules = [self._schedule_of(part) for part in self.parts] if self.stages is not None else []
        if self.stages is None and any(part.stages is not None for part in self.parts):
            raise PruningError("settings with pruning.stages need them in the specification of the whole as well")
        self.merges = self.merges or any(part.merges for part in self.parts)
        self.reads_text = self.reads_text or any(part.reads_text for part in self.parts)
        self.reads_text_tower = self.reads_text_tower or any(part.reads_text_tower for part in self.parts)

    @property
    def needs(self) -> frozenset[str]:
        """Signals that any of the methods reads."""
        return self.pruner.needs.union(*(part.needs for part in self.parts))

    def can_project_kept(self) -> bool:
        """Return whether no method chooses by the projector's output."""
        return super().can_project_kept() and all(part.can_project_kept() for part in self._one_of_each())

    def reading_projector(self) -> list[str]:
        """Return the names of the methods that choose by the projector's output."""
        found = super().reading_projector()
        for part in self._one_of_each():
            found += part.reading_projector()
        return list(dict.fromkeys(found))

    def _one_of_each(self) -> list[PrunedModel]:
        """Return one part of every method."""
        return list({_method_of(part): part for part in self.parts}.values())

    def _schedule_of(self, part: PrunedModel) -> Schedule:
        """Return what a setting keeps inside the LLM, at the boundaries of the whole."""
        assert self.stages is not None
        whole = self.stages.schedule
        if part.stages is None:
            return whole.keeping_all()
        if not part.stages.schedule.has_places_of(whole):
            raise PruningError(
                "rows of one batch are cut at the same layers by the same stages: settings of pruning.stages differ "
                "in budgets alone (keep and average), not in name, boundaries or options"
            )
        return part.stages.schedule

    def _plan(self, inputs: Mapping[str, Any], asked: Mapping[str, Any], cells: Sequence[int] | None) -> Plan:
        """Return what is to be kept inside the LLM of a batch, of each row as its setting says."""
        assert self.stages is not None
        schedules = None if cells is None else [self._schedules[cell] for cell in cells]
        return self.stages.plan(inputs, asked, schedules)

    def _read_for(self, blanks: Mapping[str, Vision], cells: Sequence[int] | None = None) -> dict[str, Vision]:
        """Return dummies, after as many readings of text as images have."""
        if cells is None:
            return super()._read_for(blanks)
        for part in self._one_of_each():
            part._read_for(blanks)
        return dict(blanks)

    def _settings_of(
        self, rows: Sequence[int], keep: Budget, cells: Sequence[int] | None
    ) -> list[tuple[Choosing, Budget]]:
        """Return the part of each image's setting, and its budget."""
        if cells is None:
            return super()._settings_of(rows, keep, None)
        own = [self.parts[cells[row]] for row in rows]
        return [(part, part.spec.keep) for part in own]

    def _choose(
        self,
        vision: Vision,
        instructions: Sequence[str],
        rows: list[int],
        rule: BudgetRule,
        names: Mapping[int, str],
        cells: Sequence[int] | None = None,
    ) -> Chosen:
        """Let each image's own pruner choose from it."""
        if cells is None:
            return super()._choose(vision, instructions, rows, rule, names)
        found = Chosen(vision)
        seen: dict[str, Vision] = {}
        for number, part in enumerate(self.parts):
            # Read of all images for every method, whichever of them this batch has: under ZeRO-3 ranks read in step.
            key = _method_of(part)
            if key not in seen:
                seen[key] = part._read(vision, instructions, rows)
            images = frozenset(image for image, row in enumerate(rows) if cells[row] == number)
            if images:
                own = replace(rule, keep=part.spec.keep)
                chosen = part._choose_from(seen[key], vision, own, names, images)
                found.candidates.extend(chosen.candidates)
                found.selections.extend(chosen.selections)
        return found


def _method_of(part: PrunedModel) -> str:
    """Return what tells methods with their options apart, whatever the budget is."""
    return part.spec.model_dump_json(exclude={"keep", "stages"})


def _check_alike(spec: PruningSpec, setting: PruningSpec) -> None:
    """Check that a setting differs from another in what it keeps alone; raises PruningError."""
    own = {"pruner", "keep", "options", "profile", "stages"}
    for name, value in spec.model_dump(exclude=own).items():
        if setting.model_dump(exclude=own).get(name) != value:
            raise PruningError(
                f"the settings of one batch differ in pruner, options and budget alone; {name} is {value!r} in one and "
                f"{getattr(setting, name)!r} in another"
            )
