"""Which visual tokens of an image a method keeps, asked of a model's own vision side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunetune.pruning.admission import check_reads_no_tower
from prunetune.pruning.budget import Budget, BudgetRule, check_budget
from prunetune.pruning.errors import PruningError, Unprojected
from prunetune.pruning.families.base import family_of
from prunetune.pruning.hooks import frozen_parts_at_rest
from prunetune.pruning.live import why_not_live
from prunetune.pruning.registry import merges, method_of
from prunetune.pruning.rewrite import Chosen
from prunetune.pruning.select import Candidates, candidates, check_poolable, check_signals, check_videos, choose
from prunetune.pruning.signals import of_source, signal_of
from prunetune.pruning.spec import PruningSpec
from prunetune.pruning.stages.inside import stages_of
from prunetune.pruning.text import TextReader
from prunetune.pruning.types import Selection
from prunetune.pruning.vision import Vision


class Choosing:
    """A stock model's vision side and the method that chooses from what it makes; nothing is rewritten yet.

    See :class:`PrunedModel` for the arguments.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: PruningSpec,
        tokenizer: PreTrainedTokenizerBase | None = None,
        original: PreTrainedModel | None = None,
        text: TextReader | None = None,
    ) -> None:
        self.model = model
        self.spec = spec
        self.original = self._original(original)
        self.family = family_of(model)
        self.pruner = spec.build()
        self.merges = merges(spec.pruner, self.pruner)
        self.sees_clips = method_of(spec.pruner).video
        check_videos(spec.pruner, self.sees_clips, self.family.name, self.family.pixels)
        self._check_video_budget()
        self.position_policy = self._position_policy()
        if getattr(self.pruner, "order", None) == "published":
            self._check_order()
        self.stages = stages_of(model, self.family, spec.stages)
        self.text = TextReader(model, tokenizer, spec.text_tower) if text is None else text
        config: Any = model.config
        tower = getattr(getattr(config, "vision_config", None), "model_type", config.model_type)
        if not self.family.tower_features:
            check_reads_no_tower(self.pruner, self.spec.pruner, self.merges, self.family.name)
        # Here and not with the first batch: what the tower lacks it lacks for all of them.
        check_signals(self.pruner, self.family.signals(model), self.text.signals(), tower)
        texts = [signal_of(need) for need in of_source(self.pruner.needs, "text")]
        self.reads_text = bool(texts)
        self.reads_text_tower = any(signal.space == "clip" for signal in texts)
        if self.reads_text_tower:
            _ = self.text.clip  # loaded now: later an active ZeRO-3 configuration would partition it

    def _original(self, original: PreTrainedModel | None) -> PreTrainedModel | None:
        """Return the model by whose projector tokens are chosen; None chooses by the one that runs."""
        if self.spec.choose_with == "tuned":
            return None
        if original is None:
            raise PruningError(
                "choose_with: original needs the base's projector beside the one that runs: load the model with "
                "prunetune.Arm.load, or give PrunedModel `original`"
            )
        return original

    @property
    def needs(self) -> frozenset[str]:
        """Signals that are read of every image."""
        return self.pruner.needs

    def _position_policy(self) -> str:
        known = self.family.position_policies
        policy: str = self.spec.position_policy
        if policy == "auto":
            policy = known[0]
        if policy not in known:
            raise PruningError(
                f"family {self.family.name!r} can't have position_policy: {policy}; its positions are "
                f"{' or '.join(known)}. Numbered anew they would be another model's: they count rows and columns"
            )
        return policy

    def _check_video_budget(self) -> None:
        """Check that a budget of videos meets a family that has any: images would go on with one of their own."""
        if self.spec.video_budget == "auto" or "video" in self.family.pixels:
            return
        why = "takes no videos"
        if self.family.frames_are_images:
            why = "gets the frames of a video as images, and is not told which are one video's"
        raise PruningError(
            f"video_budget: {self.spec.video_budget} can't be kept: family {self.family.name!r} {why}; leave "
            "pruning.video_budget at auto, keep counts for each item"
        )

    def _check_order(self) -> None:
        """Check that tokens in an order of the method's own are numbered anew: positions are those of the slots."""
        if self.position_policy == "compact":
            return
        can = "compact" in self.family.position_policies
        todo = "set position_policy: compact" if can else f"choose raster order, family {self.family.name!r} can't"
        raise PruningError(
            f"{self.spec.pruner} hands tokens on in an order of its own, and with position_policy: original each would "
            f"stand at the position of another; such an order needs position_policy: compact: {todo}"
        )

    def encode(self, inputs: Mapping[str, Any], needs: frozenset[str] | None = None) -> dict[str, Vision]:
        """Run the model's own vision side and return the images and videos of a batch, by modality.

        The result is plain data: it can be stored and given to :meth:`prepare` later.

        Args:
            inputs: what the processor returned.
            needs: the signals to read, for other pruners of the same model; None is what this one's pruner needs.
        """
        needs = self.needs if needs is None else needs
        visions = {}
        inputs = self.family.renamed(inputs)
        with frozen_parts_at_rest(*self.family.frozen_parts(self.model)):
            for modality, name in self.family.pixels.items():
                if name in inputs:
                    visions[modality] = self.family.encode(self.model, inputs, modality, needs)
        return visions

    def choose(
        self,
        vision: Vision,
        instructions: Sequence[str] = (),
        rows: Sequence[int] | None = None,
        keep: Budget | None = None,
        names: Mapping[int, str] | None = None,
    ) -> Chosen:
        """Let the pruner choose from encoded images; :meth:`prepare` does it and rewrites the batch.

        Args:
            vision: of this model, with the signals that the pruner needs.
            instructions: one text per row, for methods that read it.
            rows: the row of each image; None is a row each.
            keep: the budget; None is the specification's.
            names: what to call an image in a message.

        Raises:
            PruningError: if the budget does not fit, or a text is missing.
        """
        rows = list(range(len(vision.slots))) if rows is None else list(rows)
        self._check_instructions(instructions, max(rows, default=-1) + 1)
        budget = self.spec.keep if keep is None else check_budget(keep)
        rule = BudgetRule(budget, self.spec.small_images, self._unit())
        return self._choose(vision, instructions, rows, rule, names or {})

    def _choose(
        self,
        vision: Vision,
        instructions: Sequence[str],
        rows: list[int],
        rule: BudgetRule,
        names: Mapping[int, str],
        cells: Sequence[int] | None = None,
    ) -> Chosen:
        """Let the pruner choose from every group of images.

        Args:
            vision: the images.
            instructions: one text per row.
            rows: the row of each image.
            rule: the budget.
            names: what to call an image in a message.
            cells: the setting of each row, which a model of one setting has none of.
        """
        if cells is not None:
            raise has_cells()
        return self._choose_from(self._read(vision, instructions, rows), vision, rule, names)

    def _read(self, vision: Vision, instructions: Sequence[str], rows: Sequence[int]) -> Vision:
        """Return the images as the pruner sees them: with what it reads of the text, and the projector it goes by."""
        if self.original is not None:
            # What moved the model may have left it behind: it is no part of the model, but for what they share.
            self.original.to(vision.groups[0].features.device)  # type: ignore[arg-type] # a device is as good as a string
            with torch.no_grad():
                vision = self.family.reproject(self.original, vision)
        return self.text.add(vision, self.pruner, instructions, rows)

    def _choose_from(
        self,
        seen: Vision,
        vision: Vision,
        rule: BudgetRule,
        names: Mapping[int, str],
        images: frozenset[int] | None = None,
    ) -> Chosen:
        """Let the pruner choose from what it sees.

        Args:
            seen: the images as the pruner sees them.
            vision: the same as they reach the LLM.
            rule: the budget.
            names: what to call an image in a message.
            images: the numbers of those that are pruned here; None is all.
        """
        clips = self.sees_clips and vision.modality == "video"
        if self.spec.scope == "image" and vision.cut_up and not clips:
            check_poolable(self.pruner)
        found = []
        for looked_at, group in zip(self._candidates(seen), self._candidates(vision), strict=True):
            wanted = list(range(len(group.images)))
            if images is not None:
                wanted = [row for row in wanted if group.images[row] in images]
            if wanted:
                found += choose(self.pruner, looked_at.rows(wanted), rule, names, group.rows(wanted))
        if any(selection.in_order for _, selection in found):
            self._check_order()  # of methods whose options do not say it
        return Chosen(seen if self.original is None else vision, *_in_two_lists(found))

    def _candidates(self, vision: Vision) -> list[Candidates]:
        return candidates(vision, self.spec.scope, self.sees_clips)

    def _unit(self) -> str:
        """Return what the budget counts for in a video."""
        if self.spec.video_budget != "auto":
            return self.spec.video_budget
        return "clip" if self.spec.scope == "image" else "frame"

    def _check_instructions(self, instructions: Sequence[str], rows: int) -> None:
        if self.reads_text and len(instructions) != rows:
            raise PruningError(
                f"{self.spec.pruner} reads the instruction: pass `instructions`, one text per row "
                f"({rows} rows, {len(instructions)} texts), or build batches with "
                "Formatter(..., instructions=instruction_text)"
            )

    @torch.no_grad()
    def chooses_by_projector(self) -> bool:
        """Return whether the method reads the projector's output: it is asked about a dummy image without any."""
        if self.spec.pruner == "identity":
            return False
        visions = self.encode(self.family.blank(self.model))
        try:
            for vision in visions.values():
                self._choose(vision.unprojected(), [""], [0], BudgetRule(1, "keep_all"), {})
        except Unprojected:
            return True
        return False

    def reading_projector(self) -> list[str]:
        """Return the names of the methods that choose by the projector's output."""
        return [self.spec.pruner] if self.chooses_by_projector() else []

    def can_project_kept(self) -> bool:
        """Return whether the projector may be left out while choosing: the method is asked about a dummy image."""
        if not self.family.projects_tokens or self.sees_clips:
            return False
        with self.family.without_projector(self.model):
            return not self.chooses_by_projector()

    def why_not_live(self) -> str | None:
        """Return why this method can't choose from images of which all tokens are stored; None if it can."""
        return why_not_live(self.spec.pruner, self.pruner, self.merges, self.sees_clips)


def has_cells() -> PruningError:
    """Return the error of a batch with settings of its rows, which a model of one setting has none of."""
    return PruningError(
        "the batch has `cells`, a setting for each row, and this model prunes all rows alike; give it to an "
        "ElasticModel"
    )


def _in_two_lists(found: Sequence[tuple[Candidates, Selection]]) -> tuple[list[Candidates], list[Selection]]:
    return [among for among, _ in found], [selection for _, selection in found]
