"""The plug: one function that rewrites a model's inputs, so that the stock model runs on fewer visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from prunetune.pruning.budget import Budget
from prunetune.pruning.continuous import ContinuousBatch, LonePrompt, check_continuous, lone_prompts
from prunetune.pruning.errors import PruningError
from prunetune.pruning.families.base import PrunedOutput
from prunetune.pruning.prefix import SharedPrompts, check_shares, grouped, is_left_padded, prompts_of, share
from prunetune.pruning.preparing import Preparing
from prunetune.pruning.rewrite import Pruned
from prunetune.pruning.stages.inside import counted_inside
from prunetune.pruning.stages.plan import PLAN, Plan
from prunetune.pruning.stages.run import attached_to, check_generation, check_none_attached, is_begun
from prunetune.pruning.static import check_static, static_options
from prunetune.pruning.turns import turn_of
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


class PrunedModel(Preparing):
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


def _shifted(inputs: Mapping[str, Any], by: int) -> dict[str, Any]:
    """Return inputs with positions, where there are any, counted from another number."""
    positions = inputs.get("position_ids")
    return dict(inputs) if positions is None or not by else {**inputs, "position_ids": positions + by}
