"""A batch for the stock model: images encoded or taken from a cache, pruned, and the ids and masks to match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from prunetune.pruning.admission import admit
from prunetune.pruning.budget import Budget, BudgetRule, check_budget
from prunetune.pruning.choosing import Choosing, has_cells
from prunetune.pruning.errors import PruningError
from prunetune.pruning.families.base import PrunedOutput
from prunetune.pruning.hooks import is_partitioned
from prunetune.pruning.live import check_can_choose, chosen_anew, live_vision
from prunetune.pruning.rewrite import Pruned, check_aligned, check_inputs, rewrite
from prunetune.pruning.select import seconds_of
from prunetune.pruning.sequence import placeholders, shorten
from prunetune.pruning.stages.run import is_begun
from prunetune.pruning.stored import StoredImages, another_choice, choice_of, is_all_tokens
from prunetune.pruning.vision import Vision


class Preparing(Choosing):
    """Rewrites inputs so that the stock model runs on the chosen tokens; see :class:`PrunedModel`."""

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
    ) -> list[tuple[Choosing, Budget]]:
        """Return what prunes the images of these rows, and their budgets."""
        if cells is not None:
            raise has_cells()
        return [(self, keep)] * len(rows)

    def _chosen_anew(
        self, stored: StoredImages, settings: Sequence[tuple[Choosing, Budget]]
    ) -> list[tuple[Choosing, Budget, list[int]]]:
        """Return from which of the stored images a method chooses now, by method and budget.

        Args:
            stored: the images.
            settings: for each image its pruned model and budget.

        Raises:
            PruningError: if an image was chosen from by another pruner or budget than its own.
        """
        asked: dict[tuple[int, str], dict[str, Any]] = {}
        anew: dict[tuple[int, str], tuple[Choosing, Budget, list[int]]] = {}
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

    def _choose_anew(
        self,
        stored: StoredImages,
        projected: Tensor,
        anew: Sequence[tuple[Choosing, Budget, list[int]]],
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

    def _placeholders_in(self, inputs: Mapping[str, Any]) -> Bool[Tensor, "B L"]:
        """Return which ids are placeholders of any modality, padding aside."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        found = torch.isin(ids, torch.tensor(self.family.token_ids(self.model), device=ids.device))
        return found if mask is None or mask.shape != ids.shape else found & mask.bool()
