"""The plug: one function that rewrites a model's inputs, so that the stock model runs on fewer visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunetune.pruning.admission import admit, check_reads_no_tower
from prunetune.pruning.budget import Budget, BudgetRule, check_budget
from prunetune.pruning.continuous import ContinuousBatch, LonePrompt, check_continuous, lone_prompts
from prunetune.pruning.errors import PruningError, Unprojected
from prunetune.pruning.families.base import PrunedOutput, family_of
from prunetune.pruning.hooks import frozen_parts_at_rest, is_partitioned
from prunetune.pruning.live import check_can_choose, chosen_anew, live_vision, why_not_live
from prunetune.pruning.prefix import SharedPrompts, check_shares, grouped, is_left_padded, prompts_of, share
from prunetune.pruning.registry import merges, method_of
from prunetune.pruning.rewrite import Chosen, Pruned, check_aligned, check_inputs, rewrite
from prunetune.pruning.select import (
    Candidates,
    candidates,
    check_poolable,
    check_signals,
    check_videos,
    choose,
    seconds_of,
)
from prunetune.pruning.sequence import placeholders, shorten
from prunetune.pruning.signals import of_source, signal_of
from prunetune.pruning.spec import PruningSpec
from prunetune.pruning.stages.inside import counted_inside, stages_of
from prunetune.pruning.stages.plan import PLAN, Plan
from prunetune.pruning.stages.run import attached_to, check_generation, check_none_attached, is_begun
from prunetune.pruning.static import check_static, static_options
from prunetune.pruning.stored import StoredImages, another_choice, choice_of, is_all_tokens
from prunetune.pruning.text import TextReader
from prunetune.pruning.turns import turn_of
from prunetune.pruning.types import Selection
from prunetune.pruning.vision import Vision

LATER_IMAGES = "images in a later turn can't be pruned: the cache holds the turns before as they were"


@dataclass(frozen=True)
class Generated:
    """What a pruned model generated.

    Attributes:
        tokens: (B, T) new token ids, without the prompt.
        kept: for each modality how many visual tokens of each image reached the LLM, images in reading order.
        kept_per_frame: for each video how many of each of its frames did.
        notes: for each modality what the method noted of each image by name, such as ``ran_dry``.
        rows: for each modality the row of the batch that each image is in: where every tile counts as an image, a row
            has several.
        prefixes: how many prefixes were computed for the batch; None if every prompt was computed whole.
        why_whole: why it was, where prefixes were to be shared and could not.
        layers: with stages inside the LLM, for each row of the prompts how many visual tokens each layer processed; the
            last of them is the final count, their mean the average.
        final: with stages, which columns of the pruned prompts hold visual tokens that the last layer processes.
    """

    tokens: Int[Tensor, "B T"]
    kept: Mapping[str, list[int]]
    kept_per_frame: Sequence[list[int]] = ()
    notes: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    rows: Mapping[str, list[int]] = field(default_factory=dict)
    prefixes: int | None = None
    why_whole: str | None = None
    layers: Sequence[Sequence[int]] = ()
    final: Bool[Tensor, "B L"] | None = None


class PrunedModel:
    """A stock Hugging Face model and the pruner in front of its LLM.

    The model itself is not changed, and nothing is remembered between calls. ``prepare`` rewrites inputs; ``forward``
    and ``generate`` call the stock model on them; ``attach`` lets a trainer call the model as usual. Calls of the stock
    model from several threads wait for each other, whichever pruned models they are of; one that a trainer makes by
    itself while a model is attached does not.

    Args:
        model: a conditional-generation model (under PEFT: ``peft_model.get_base_model()``).
        spec: pruner, budget and position policy.
        tokenizer: the model's tokenizer, for methods that read the instruction's tokens.
        original: the same model with the projector that ``choose_with: original`` means, which may share every other
            tensor; nothing but its projector runs.
        text: reads instructions, where another pruned model of the same tower has it already.

    Raises:
        PruningError: if the model does not offer what the pruner reads, naming what works or what to set; for a
            position policy that the family can't have.
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

    def prepare(
        self,
        inputs: Mapping[str, Any],
        padding_side: str = "right",
        keep: Budget | None = None,
        vision: Mapping[str, Vision] | None = None,
        project_kept: bool = False,
        stored: StoredImages | None = None,
    ) -> Pruned:
        """Encode the images, prune, and return inputs for the stock model.

        A row ``<s> i i i i Q </s>`` of whose image the first and the third token are kept becomes ``<s> i i Q </s>``,
        with the two features in ``inputs["mm_encoder_outputs"]``.

        Args:
            inputs: what the processor returned, ``attention_mask`` (B, L) included; for methods that read the
                instruction also ``instructions``, one text per row without any answer, for budgets per second
                ``video_seconds``, how long each video is, and for messages ``sample_ids``, one name per row (a
                ``Formatter`` adds them). ``stored`` may be among them, and ``cells`` of an ``ElasticModel``.
            padding_side: where the shortened rows are padded.
            keep: the budget of this call; None is the specification's.
            vision: the images, if they were encoded before: pixels are not read then, and the projector is applied
                to the stored features as it is now.
            project_kept: apply the projector to kept tokens alone, which rounds as a smaller product does; for training
                where :meth:`can_project_kept`.
            stored: the images, if a feature cache holds what is kept of them: neither tower nor pruner runs then, and
                no pixel is read. From images of which all tokens are stored a method that reads nothing of the tower
                chooses now. A batch of text alone has those of no image.

        Raises:
            PruningError: if placeholders and images disagree, the mask is missing or the budget does not fit, or what
                is stored was chosen by another pruner or budget.
        """
        inputs = self.family.renamed(inputs)
        stored = inputs.pop("stored", stored)
        vision = inputs.pop("vision", vision)
        instructions = inputs.pop("instructions", ())
        cells = inputs.pop("cells", None)
        sample_ids = inputs.pop("sample_ids", ())
        seconds = inputs.pop("video_seconds", ())
        keep = self.spec.keep if keep is None else check_budget(keep)
        if inputs.get("attention_mask") is None:
            raise PruningError(
                "pruned inputs need a 2-D attention_mask: without it, gaps in the positions are read "
                "as several packed sequences; call the processor with padding=True"
            )
        check_inputs(inputs, self.family)
        if stored is not None:
            here = stored.to(self.model.device)
            return self._prepare_stored(inputs, here, padding_side, keep, instructions, sample_ids, cells)
        if self.family.unproven and vision is None:
            admit(self.model, self.family, inputs, self.position_policy)
        with self.family.without_projector(self.model) if project_kept else nullcontext():
            visions, blanks = self._encode_with_blanks(inputs, vision)
        if project_kept:
            visions = {modality: images.unprojected() for modality, images in visions.items()}
        if not visions:
            return self._without_images(inputs, blanks, project_kept, cells)
        check_aligned(inputs, self.family)
        ids = inputs["input_ids"]
        self._check_instructions(instructions, len(ids))
        placeholders_at, chosen, rows_of = {}, {}, {}
        for modality, images in visions.items():
            token = self.family.token_id(self.model, modality)
            placeholders_at[modality], rows = placeholders(ids, token, images.lengths, modality)
            rows_of[modality] = rows
            names = {}
            if sample_ids:
                names = {image: f"sample {sample_ids[row]!r}" for image, row in enumerate(rows)}
            rule = BudgetRule(keep, self.spec.small_images, self._unit(), seconds_of(images, inputs, seconds))
            chosen[modality] = self._choose(images, instructions, rows, rule, names, cells)
        blanks = self._read_for(blanks, cells)  # before anything is projected, as on the ranks that have such images
        pruned = rewrite(
            self.model,
            self.family,
            inputs,
            chosen,
            placeholders_at,
            newline=self.spec.newline,
            position_policy=self.position_policy,
            padding_side=padding_side,
            merges=self.merges,
            project_kept=project_kept,
        )
        for modality, blank in blanks.items():
            pruned.inputs["mm_encoder_outputs"][modality] = self._nothing_of(modality, blank, project_kept)
        return replace(pruned, rows=rows_of)

    def can_project_kept(self) -> bool:
        """Return whether the projector may be left out while choosing: the method is asked about a dummy image."""
        if not self.family.projects_tokens or self.sees_clips:
            return False
        with self.family.without_projector(self.model):
            return not self.chooses_by_projector()

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

    def _prepare_stored(
        self,
        inputs: dict[str, Any],
        stored: StoredImages,
        padding_side: str,
        keep: Budget,
        instructions: Sequence[str],
        sample_ids: Sequence[str],
        cells: Sequence[int] | None,
    ) -> Pruned:
        """Return inputs for the stock model with images of a feature cache."""
        for modality, name in self.family.pixels.items():
            if inputs.get(name) is not None and (modality != stored.modality or not stored.lengths):
                raise PruningError(
                    f"the batch holds {name!r} beside stored images, which would run unpruned; a batch has all its "
                    "images from the feature cache, or none"
                )
        if not stored.lengths:
            nothing = {}
            if (self.model.training and torch.is_grad_enabled()) or is_partitioned(self.model.parameters()):
                # Called all the same, so that ranks agree on the projector's gradient, and under ZeRO-3 on its calls.
                features = stored.features(partial(self.family.project, self.model))
                nothing = {stored.modality: self.family.put_back([features], [], stored.modality)}
            return replace(self._text_alone(inputs, nothing), stored=stored)
        check_aligned(inputs, self.family)
        token = self.family.token_id(self.model, stored.modality)
        lengths = list(stored.lengths)
        found, rows = placeholders(inputs["input_ids"], token, lengths, stored.modality)
        anew = self._chosen_anew(stored, self._settings_of(rows, keep, cells))
        projected = stored.features(partial(self.family.project, self.model))
        if anew:
            all_tokens = stored.stays
            for part, _, _ in anew:
                part._check_instructions(instructions, len(inputs["input_ids"]))
            stored = self._choose_anew(stored, projected, anew, rows, instructions, sample_ids)
            projected = projected[stored.stays[all_tokens]]
        pruned = rewrite(
            self.model,
            self.family,
            inputs,
            {},
            {stored.modality: found},
            newline=self.spec.newline,
            position_policy=self.position_policy,
            padding_side=padding_side,
            merges=self.merges,
            stored=stored,
            projected=projected,
        )
        return replace(pruned, rows={stored.modality: rows})

    def _settings_of(
        self, rows: Sequence[int], keep: Budget, cells: Sequence[int] | None
    ) -> list[tuple[PrunedModel, Budget]]:
        """Return what prunes the images of these rows, and their budgets."""
        if cells is not None:
            raise _has_cells()
        return [(self, keep)] * len(rows)

    def _chosen_anew(
        self, stored: StoredImages, settings: Sequence[tuple[PrunedModel, Budget]]
    ) -> list[tuple[PrunedModel, Budget, list[int]]]:
        """Return from which of the stored images a method chooses now, by method and budget.

        Args:
            stored: the images.
            settings: for each image its pruned model and budget.

        Raises:
            PruningError: if an image was chosen from by another pruner or budget than its own.
        """
        asked: dict[tuple[int, str], dict[str, Any]] = {}
        anew: dict[tuple[int, str], tuple[PrunedModel, Budget, list[int]]] = {}
        for image, (choice, (part, keep)) in enumerate(zip(stored.choices, settings, strict=True)):
            key = (id(part), repr(keep))  # 1 and 1.0 are one key, and two budgets
            if key not in asked:
                asked[key] = choice_of(part.spec, keep)
            if choice == asked[key]:
                continue
            if not is_all_tokens(choice):
                raise another_choice(choice, asked[key])
            why = part.why_not_live()
            if why is not None:
                raise PruningError(f"{another_choice(choice, asked[key])}, since {why}")
            anew.setdefault(key, (part, keep, []))[2].append(image)
        check_can_choose(stored, [image for _, _, images in anew.values() for image in images])
        return list(anew.values())

    def why_not_live(self) -> str | None:
        """Return why this method can't choose from images of which all tokens are stored; None if it can."""
        return why_not_live(self.spec.pruner, self.pruner, self.merges, self.sees_clips)

    def _choose_anew(
        self,
        stored: StoredImages,
        projected: Tensor,
        anew: Sequence[tuple[PrunedModel, Budget, list[int]]],
        rows: list[int],
        instructions: Sequence[str],
        sample_ids: Sequence[str],
    ) -> StoredImages:
        """Return stored images after methods chose from some of them."""
        chosen = []
        for part, keep, images in anew:
            if part.reads_text and is_partitioned(self.model.parameters()):
                raise PruningError(
                    f"{part.spec.pruner} reads the instruction when it chooses from stored features, and under ZeRO-3 "
                    "ranks without such an image would not follow; set train.deepspeed: zero2, or run without features"
                )
            vision, rows_of = live_vision(stored, projected, images, rows)
            names = {tile: f"sample {sample_ids[row]!r}" for tile, row in enumerate(rows_of)} if sample_ids else {}
            rule = BudgetRule(keep, part.spec.small_images, part._unit())
            chosen.append((images, part._choose(vision, instructions, rows_of, rule, names)))
        return chosen_anew(stored, chosen)

    def _projected_now(self, visions: Mapping[str, Vision]) -> dict[str, Vision]:
        """Return stored images as the projector of now sees them: it may have been tuned since, or be in training."""
        return {name: self.family.reproject(self.model, vision) for name, vision in visions.items()}

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
            raise _has_cells()
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

    def _encode_with_blanks(
        self, inputs: Mapping[str, Any], stored: Mapping[str, Vision] | None
    ) -> tuple[dict[str, Vision], dict[str, Vision]]:
        """Return the images of a batch, and a dummy of each modality that the ranks agree by and this batch has not.

        In training a batch of text alone has a gradient of the projector, if of zero. Under ZeRO-3 ranks gather weights
        in step, so each calls every module as often as the others, whichever of images and videos it has.

        Raises:
            PruningError: for stored images in training under ZeRO-3.
        """
        if stored is None:
            there = {modality for modality, name in self.family.pixels.items() if inputs.get(name) is not None}
        else:
            there = set(stored)
        missing: list[str] = []
        trains = self.model.training and torch.is_grad_enabled()
        partitioned = is_partitioned(self.model.parameters())
        if trains and partitioned and stored is not None:
            raise PruningError(
                "stored images can't be trained on under ZeRO-3, since ranks that encode theirs call the tower and "
                "would wait for this one; give pixels instead of vision=, or train with train.deepspeed: zero2"
            )
        if trains or (partitioned and stored is None):  # also where ranks measure a held-out loss together
            wanted = list(self.family.pixels) if partitioned else ["image"] * (not there)
            missing = [modality for modality in wanted if modality not in there]
        blanks: dict[str, Any] = {}
        for modality in missing:
            blanks |= self.family.blank_of(self.model, modality)
        if stored is None:
            visions = self.encode({**inputs, **blanks})  # in one go: modalities come in the same order on every rank
        else:
            visions = self._projected_now(stored) | self.encode(blanks)
        return visions, {modality: visions.pop(modality) for modality in missing}

    def _without_images(
        self, inputs: dict[str, Any], blanks: Mapping[str, Vision], project_kept: bool, cells: Sequence[int] | None
    ) -> Pruned:
        """Pass text through; in training it reaches the projector all the same."""
        if not is_begun(inputs.get("past_key_values")) and bool(self._placeholders_in(inputs).any()):
            raise PruningError(
                "the ids hold placeholders of images and there are no pixels, so they would run as words; pass what "
                "the processor returned of text and images together"
            )
        blanks = self._read_for(blanks, cells)
        encoded = {modality: self._nothing_of(modality, blank, project_kept) for modality, blank in blanks.items()}
        return self._text_alone(inputs, encoded)

    def _text_alone(self, inputs: dict[str, Any], encoded: Mapping[str, PrunedOutput]) -> Pruned:
        """Pass text through, with no tokens that carry the projector's graph, if there are such."""
        keep = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
        for name in self.family.left_out():
            inputs.pop(name, None)
        positions = inputs.get("position_ids")
        # Given to the model, since packing tells samples apart by them; it reads (B, L) of text alone as it is.
        if self.family.counts_rows_and_columns and (positions is None or positions.ndim != 2):
            inputs = shorten(inputs, keep, self.family.positions(self.model, inputs), "right")
        if not encoded:
            return Pruned(inputs, keep)  # in inference there is no gradient to agree on
        return Pruned({**inputs, "mm_encoder_outputs": dict(encoded)}, keep)

    def _read_for(self, blanks: Mapping[str, Vision], cells: Sequence[int] | None = None) -> dict[str, Vision]:
        """Return dummies with the text that the method reads."""
        return {modality: self.text.add(blank, self.pruner, [""], [0]) for modality, blank in blanks.items()}

    def _nothing_of(self, modality: str, vision: Vision, project_kept: bool = False) -> PrunedOutput:
        """Return zero tokens of a dummy, after all that is done with the tokens of an image."""
        features = vision.slots[0][:0]
        # As often as an image's own tokens are: under ZeRO-3 ranks call the projector in step.
        for _ in range(self.merges + project_kept):
            nothing = vision.groups[0].features[0, :0]
            features = torch.cat([features, self.family.project(self.model, nothing)])
        levels = [[level[0][:0]] for level in vision.levels]
        return self.family.put_back([features], levels, modality)

    def forward(self, *, keep: Budget | None = None, vision: Mapping[str, Vision] | None = None, **inputs: Any) -> Any:
        """Run the stock model on pruned inputs and return its output; ``labels`` are shortened with the rest.

        Args:
            keep: the budget of this call, as of :meth:`prepare`.
            vision: the images, if they were encoded before.
            inputs: what the processor returned.
        """
        return self.run(self.prepare(inputs, keep=keep, vision=vision), cells=inputs.get("cells"))

    def run(self, pruned: Pruned, inputs: Mapping[str, Any] | None = None, cells: Sequence[int] | None = None) -> Any:
        """Run the stock model on what :meth:`prepare` returned, stages inside the LLM included; return its output.

        Args:
            pruned: the prepared batch; where it has labels, stages ask the token before each row's answer.
            inputs: what the model is called with, such as those without labels; None is all of the batch.
            cells: the number of each row's setting, of an ``ElasticModel`` whose batch had them.
        """
        asked = dict(pruned.inputs if inputs is None else inputs)
        with self._inside():
            if self.stages is not None and not is_begun(asked.get("past_key_values")):
                asked[PLAN] = self._plan(pruned.inputs, asked, cells)
            return self.model(**asked)

    def generate(
        self,
        *,
        keep: Budget | None = None,
        vision: Mapping[str, Vision] | None = None,
        seen: Callable[[Pruned], None] | None = None,
        **inputs: Any,
    ) -> Generated:
        """Generate from pruned inputs.

        Args:
            keep: the budget of this call, as of :meth:`prepare`.
            vision: the images, if they were encoded before.
            seen: is called with the pruned prompts before the LLM is; what it raises stops the call.
            inputs: what the processor returned; generation options (``max_new_tokens`` and so on) pass through to the
                stock method.
        """
        if self.stages is not None:
            check_generation(self.model, inputs)
            if inputs.get("cells") is not None:
                raise PruningError("with pruning.stages rows can't generate in settings of their own; leave cells out")
        with torch.no_grad(), self._inside() as plans:
            pruned = self._prompts(inputs, keep, vision)
            if seen is not None:
                seen(pruned)
            model: Any = self.model  # generate() comes from a mixin that the type of all models does not have
            output = model.generate(**_shifted(pruned.inputs, -self.family.first_position))
        generated = _generated(output[:, pruned.inputs["input_ids"].shape[1] :], pruned)
        if not plans:  # without stages, or on a cache that was made before
            return generated
        return self._with_layers(generated, pruned, plans[0])

    @contextmanager
    def _inside(self) -> Iterator[list[Plan]]:
        """While open, the model runs with this one's stages alone, if any; collects the plan of every prefill.

        Another thread's call waits meanwhile: it would run with these stages, or end them halfway.
        """
        with ExitStack() as undo:
            undo.enter_context(turn_of(self.model))
            here = attached_to(self.model)
            if here is not self.stages:
                # Another's, such as those of a trainer whose dense model is asked in between.
                if here is not None:
                    undo.enter_context(here.paused())
                if self.stages is not None:
                    undo.enter_context(self.stages.attached(self.model))
            yield [] if self.stages is None else undo.enter_context(self.stages.noted())

    def _with_layers(self, generated: Generated, pruned: Pruned, plan: Plan) -> Generated:
        """Return what was generated with the counts of every layer."""
        rows = len(pruned.inputs["input_ids"])
        copies = len(plan.counts) // rows  # of beams and of several answers to a prompt
        counts = plan.counts[::copies]
        notes = counted_inside(self.model, self.family, pruned, plan, copies)
        for modality, noted in generated.notes.items():
            for own, inside in zip(noted, notes[modality], strict=True):
                inside.update(own)
        final = plan.kept_columns()[::copies]
        return replace(generated, layers=[own.layers for own in counts], notes=notes, final=final)

    def generate_shared(
        self,
        *,
        images: Sequence[Hashable],
        max_new_tokens: int,
        keep: Budget | None = None,
        vision: Mapping[str, Vision] | None = None,
        **inputs: Any,
    ) -> Generated:
        """Generate as :meth:`generate` does, computing what prompts about one image begin with once.

        Rows of the batch share a prefix if their prompts begin with the same ids, all visual tokens among them, and the
        same tokens of the same image are kept. Its keys and values are those of the whole prompt but for rounding:
        matrices have other shapes. A method that reads the question may keep other tokens for each question of an
        image, and then nothing is shared.

        Args:
            images: for each row what its image or video is called, None for text alone; one name is one image.
            max_new_tokens: longest answer in tokens.
            keep: the budget of this call, as of :meth:`prepare`.
            vision: the images, if they were encoded before.
            inputs: what the processor returned, and other options of greedy or sampled generation, one answer a row.

        Raises:
            PruningError: if a model can't share prefixes, or an option of generation can't.
        """
        self._check_shares(inputs)
        with torch.no_grad(), self._inside():
            pruned = self._prompts(inputs, keep, vision)
            shared, why = self._shared(pruned, inputs, images, max_new_tokens)
            model: Any = self.model
            width = pruned.inputs["input_ids"].shape[1] if shared is None else shared.width
            prompts = pruned.inputs if shared is None else shared.inputs
            prompts = _shifted(prompts, -self.family.first_position)
            if shared is not None and model.generation_config.cache_implementation is not None:
                prompts["cache_implementation"] = None  # there is a cache
            output = model.generate(**prompts, max_new_tokens=max_new_tokens)
        return _generated(output[:, width:], pruned, None if shared is None else shared.prefixes, why)

    def check_shares_prefixes(self) -> None:
        """Check that :meth:`generate_shared` can run; raises PruningError in one line if it can't."""
        self._check_shares()

    def _check_shares(self, options: Mapping[str, Any] | None = None) -> None:
        if self.stages is not None:
            raise PruningError(
                "prompts with pruning.stages can't share a prefix: what their images keep inside the LLM is chosen by "
                "the question behind it; set share_prefix: false"
            )
        check_shares(self.model, self.family, options)

    def generate_static(
        self,
        *,
        max_new_tokens: int,
        compiled: bool = True,
        keep: Budget | None = None,
        vision: Mapping[str, Vision] | None = None,
        **inputs: Any,
    ) -> Generated:
        """Generate as :meth:`generate` does, into a cache of one size, so that decoding can be compiled.

        The cache is as long as prompts and answers, rounded up: what it holds beyond them is masked, and moves last
        bits. Prompts are computed as ever; steps behind them are compiled once for each size.

        Args:
            max_new_tokens: longest answer in tokens.
            compiled: compile the steps, on a CPU as well; False runs them as they are.
            keep: the budget of this call, as of :meth:`prepare`.
            vision: the images, if they were encoded before.
            inputs: what the processor returned, and other options of generation.

        Raises:
            PruningError: for a model that can't, see :meth:`check_static`.
        """
        self.check_static()
        with torch.no_grad(), self._inside():
            pruned = self._prompts(inputs, keep, vision)
            width = pruned.inputs["input_ids"].shape[1]
            options = static_options(self.model, width + max_new_tokens, compiled)
            model: Any = self.model
            prompts = _shifted(pruned.inputs, -self.family.first_position)
            output = model.generate(**prompts, **options, max_new_tokens=max_new_tokens)
        return _generated(output[:, width:], pruned)

    def check_static(self) -> None:
        """Check that :meth:`generate_static` can run; raises PruningError in one line if it can't."""
        check_static(self.model, self.family, self.stages is not None)

    def lone_prompts(
        self,
        *,
        keep: Budget | None = None,
        vision: Mapping[str, Vision] | None = None,
        **inputs: Any,
    ) -> tuple[list[LonePrompt], Generated]:
        """Prune a batch and return its rows one by one, for a :class:`ContinuousBatch`.

        Args:
            keep: the budget of this call, as of :meth:`prepare`.
            vision: the images, if they were encoded before.
            inputs: what the processor returned.

        Returns:
            The rows' prompts, and what :meth:`generate` would say of the batch, without any token.
        """
        with torch.no_grad():
            pruned = self._prompts(inputs, keep, vision)
            nothing = pruned.inputs["input_ids"][:, :0]
            return lone_prompts(self.model, self.family, pruned), _generated(nothing, pruned)

    def continuous(
        self,
        requests: int,
        max_new_tokens: int,
        cache_tokens: int | None = None,
        step_tokens: int | None = None,
    ) -> ContinuousBatch:
        """Return a batch that prompts join and leave at any time, not begun yet; arguments are those of its class.

        Raises:
            PruningError: in one line, for a model whose answers would be others.
        """
        self.check_continuous()
        return ContinuousBatch(self.model, self.family, requests, max_new_tokens, cache_tokens, step_tokens)

    def check_continuous(self) -> None:
        """Check that :meth:`continuous` can run; raises PruningError in one line if it can't."""
        check_continuous(self.model, self.family, self.position_policy, self.stages is not None)

    def _prompts(self, inputs: Mapping[str, Any], keep: Budget | None, vision: Mapping[str, Vision] | None) -> Pruned:
        """Return pruned prompts, padded on the left, so that every row's answer begins in the same column.

        Raises:
            PruningError: for a cache that holds other tokens than the ids say.
        """
        self._check_goes_on(inputs)
        pruned = self.prepare(
            _shifted(inputs, self.family.first_position), padding_side="left", keep=keep, vision=vision
        )
        encoded = pruned.inputs.get("mm_encoder_outputs", {})
        for modality, counts in pruned.kept.items():
            if not any(counts):
                del encoded[modality]  # stock generation can't repeat nothing for its beams
        return pruned

    def _check_goes_on(self, inputs: Mapping[str, Any]) -> None:
        """Check that what a cache holds is what stock generation takes it for: the ids up to its length."""
        if not is_begun(inputs.get("past_key_values")):
            return
        full = self.family.renamed(inputs)
        if any(full.get(name) is not None for name in self.family.pixels.values()):
            raise PruningError(LATER_IMAGES)
        if self.spec.pruner != "identity" and bool(self._placeholders_in(full).any()):
            raise PruningError(
                f"this cache holds what {self.spec.pruner} left of the images, and the ids have all of their tokens, "
                "so generation would go on from another column; give the whole conversation anew, without "
                "past_key_values"
            )

    def _placeholders_in(self, inputs: Mapping[str, Any]) -> Bool[Tensor, "B L"]:
        """Return which ids are placeholders of any modality, padding aside."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        found = torch.isin(ids, torch.tensor(self.family.token_ids(self.model), device=ids.device))
        return found if mask is None or mask.shape != ids.shape else found & mask.bool()

    def _shared(
        self, pruned: Pruned, inputs: Mapping[str, Any], images: Sequence[Hashable], max_new_tokens: int
    ) -> tuple[SharedPrompts | None, str | None]:
        """Return prompts whose prefixes were computed, or None and why there are none, if that is worth a word."""
        full = self.family.renamed(inputs)
        if len(images) != len(full["input_ids"]):
            raise PruningError(f"there are {len(full['input_ids'])} rows and the names of {len(images)} images")
        if not is_left_padded(pruned.inputs["attention_mask"]):
            return None, "prompts are padded on the right"
        visual = self.family.token_ids(self.model)
        # Where a question decides what is merged, the same slots may hold something else for each.
        by_features = self.merges and self.reads_text
        prompts = prompts_of(pruned, full["input_ids"], full["attention_mask"], visual, images, by_features)
        groups = grouped(prompts)
        if groups is None:
            return None, None
        shared = share(self.model, self.family, pruned, prompts, groups, max_new_tokens)
        if shared is None:
            return None, "a sliding window is shorter than prompts and answers"
        return shared, None

    @contextmanager
    def attach(
        self,
        seen: Callable[[Pruned], None] | None = None,
        finish: Callable[[Pruned], dict[str, Any]] | None = None,
        project_kept: bool = False,
    ) -> Iterator[PrunedModel]:
        """While open, ``model(**processor_output)`` prunes by itself: for trainers that call the model.

        Args:
            seen: is called with every batch that was pruned.
            finish: returns what the model is called with; None calls it with the pruned inputs.
            project_kept: as of :meth:`prepare`.
        """

        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            if self._is_prepared(args, kwargs):
                return None  # later steps of generate() call the model again
            pruned = self.prepare(kwargs, project_kept=project_kept)
            if seen is not None:
                seen(pruned)
            asked = pruned.inputs if finish is None else finish(pruned)
            if self.stages is not None:
                # With the labels that it had: a trainer may keep them back, and answers must not choose.
                asked = {**asked, PLAN: self._plan(pruned.inputs, asked, kwargs.get("cells"))}
            return (), asked

        check_none_attached(self.model)
        handle = self.model.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            # After it: hooks run in order, and stages read the ids that it has rewritten.
            with nullcontext() if self.stages is None else self.stages.attached(self.model):
                yield self
        finally:
            handle.remove()

    def _plan(self, inputs: Mapping[str, Any], asked: Mapping[str, Any], cells: Sequence[int] | None) -> Plan:
        """Return what is to be kept inside the LLM of a batch."""
        assert self.stages is not None  # asked before
        return self.stages.plan(inputs, asked)

    def _is_prepared(self, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        """Return whether a call's inputs were pruned before: the type of its encoded images says so.

        Raises:
            PruningError: for a call that would run unpruned.
        """
        if args:
            raise PruningError("a model with an attached pruner takes keyword arguments only")
        # A type says it and no flag: nothing has to be remembered between calls, and none can be forgotten.
        encoded = kwargs.get("mm_encoder_outputs") or {}
        if any(not isinstance(output, PrunedOutput) for output in encoded.values()):
            raise PruningError(
                "these images were encoded before the pruner saw them, so the run would be unpruned; "
                "generate with PrunedModel.generate instead of model.generate"
            )
        has_pixels = any(name in self.family.renamed(kwargs) for name in self.family.pixels.values())
        later = kwargs.get("past_key_values") is not None
        if has_pixels and later:
            raise PruningError(LATER_IMAGES)
        return bool(encoded) or later  # beyond the prefill there is nothing to prune, and nothing to send along


def _generated(
    tokens: Int[Tensor, "B T"], pruned: Pruned, prefixes: int | None = None, why_whole: str | None = None
) -> Generated:
    return Generated(
        tokens=tokens,
        kept=pruned.kept,
        kept_per_frame=pruned.kept_per_frame,
        notes=pruned.notes_per_image,
        rows=pruned.rows,
        prefixes=prefixes,
        why_whole=why_whole,
    )


def _has_cells() -> PruningError:
    return PruningError(
        "the batch has `cells`, a setting for each row, and this model prunes all rows alike; give it to an "
        "ElasticModel"
    )


def _in_two_lists(found: Sequence[tuple[Candidates, Selection]]) -> tuple[list[Candidates], list[Selection]]:
    return [among for among, _ in found], [selection for _, selection in found]


def _shifted(inputs: Mapping[str, Any], by: int) -> dict[str, Any]:
    """Return inputs with positions, where there are any, counted from another number."""
    positions = inputs.get("position_ids")
    return dict(inputs) if positions is None or not by else {**inputs, "position_ids": positions + by}
