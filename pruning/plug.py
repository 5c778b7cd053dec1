"""The plug: one function that rewrites a model's inputs, so that the stock model runs on fewer visual tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pruning.budget import Budget, check_budget
from pruning.families.base import NEWLINE_POLICIES, Encoded, family_of
from pruning.registry import build_pruner
from pruning.select import SCOPES, check_signals, select, with_text
from pruning.sequence import POSITION_POLICIES, pack, placeholder_runs, shorten
from pruning.text import TextReader
from pruning.types import TEXT_SIGNALS, Pruner, PruningError, Selection, signal_name


@dataclass(frozen=True)
class PruningSpec:
    """What to prune with, as a configuration says it.

    Attributes:
        pruner: a name from ``prunetune list pruners``.
        keep: budget per item or image, see ``scope``: 64, 0.111 or "11.1%".
        options: the method's own hyperparameters.
        scope: what the budget counts for where the family cuts images into crops: each "item" or the whole "image".
        text_tower: CLIP checkpoint of the vision tower, for methods that compare with text in CLIP's space.
        position_policy: "compact" (LLaVA-style re-indexing) or "original".
        newline: which row-end tokens stay where the family has them: those of "rows" with kept tokens, "all" or "none".
    """

    pruner: str = "identity"
    keep: Budget = "100%"
    options: Mapping[str, Any] = field(default_factory=dict)
    scope: str = "item"
    text_tower: str | None = None
    position_policy: str = "compact"
    newline: str = "rows"

    def build(self) -> Pruner:
        """Return the pruner; raises PruningError for an unknown name, option, budget or policy."""
        check_budget(self.keep)
        for name, value, known in (
            ("scope", self.scope, SCOPES),
            ("position_policy", self.position_policy, POSITION_POLICIES),
            ("newline", self.newline, NEWLINE_POLICIES),
        ):
            if value not in known:
                raise PruningError(f"{name} is one of {', '.join(known)}, got {value!r}")
        return build_pruner(self.pruner, self.options)


@dataclass
class Pruned:
    """Rewritten inputs, and what became of the images.

    Attributes:
        inputs: keyword arguments for the stock model.
        selection: what the pruner kept of each item; None without images.
        encoded: the items; None without images.
        kept: how many visual tokens of each image reach the LLM, images in reading order.
    """

    inputs: dict[str, Any]
    selection: Selection | None = None
    encoded: Encoded | None = None
    kept: list[int] = field(default_factory=list)


class PrunedModel:
    """A stock Hugging Face model and the pruner in front of its LLM.

    The model itself is not changed. ``prepare`` rewrites inputs; ``forward`` and ``generate`` call the stock model on
    them; ``attach`` lets a trainer call the model as usual.

    Args:
        model: a conditional-generation model (under PEFT: ``peft_model.get_base_model()``).
        spec: pruner, budget and position policy.
        tokenizer: the model's tokenizer, for methods that read the instruction's tokens.
        packed: whether an attached model, while training, gets its batch as one row without padding.

    Raises:
        PruningError: if the model does not offer what the pruner reads, naming what works or what to set; for packing
            with original positions, whose gaps would be read as the ends of samples.
    """

    def __init__(self, model: nn.Module, spec: PruningSpec, tokenizer: Any = None, packed: bool = False) -> None:
        self.model: Any = model
        self.packed = packed
        if packed and spec.position_policy != "compact":
            raise PruningError("packing needs position_policy: compact; gaps between positions would end a sample")
        config: Any = model.config
        self.spec = spec
        self.family = family_of(model)
        self.pruner = spec.build()
        self.text = TextReader(model, tokenizer, spec.text_tower)
        check_signals(self.pruner, self.family.signals(model), self.text.signals(), config.vision_config.model_type)
        needs = {signal_name(need) for need in self.pruner.needs}
        self.reads_text = bool(needs & TEXT_SIGNALS)
        if needs & {"image_embeds", "text_embeds", "general_embeds"}:
            _ = self.text.clip  # loaded now: later an active ZeRO-3 configuration would partition it
        self.last: Pruned | None = None
        self._prepared = False

    def prepare(self, inputs: Mapping[str, Any], padding_side: str = "right") -> Pruned:
        """Encode the images, prune, and return inputs for the stock model.

        Args:
            inputs: what the processor returned, ``attention_mask`` (B, L) included; for methods that read the
                instruction also ``instructions``, one text per row without any answer (a ``Formatter`` adds them).
            padding_side: where the shortened rows are padded.

        Raises:
            PruningError: if placeholders and images disagree, the mask is missing or the budget does not fit.
        """
        inputs = {key: value for key, value in inputs.items() if value is not None}
        instructions = inputs.pop("instructions", None)
        if inputs.get("attention_mask") is None:
            raise PruningError(
                "pruned inputs need a 2-D attention_mask: without it, gaps in the positions are read "
                "as several packed sequences; call the processor with padding=True"
            )
        if "pixel_values" not in inputs:
            return self._without_images(inputs)
        encoded = self.family.encode(self.model, inputs, self.pruner.needs)
        runs = placeholder_runs(inputs["input_ids"], self.model.config.image_token_id, encoded.lengths)
        if self.reads_text and len(instructions or ()) != len(inputs["input_ids"]):
            raise PruningError(
                f"{self.spec.pruner} reads the instruction: pass `instructions`, one text per row "
                f"({len(inputs['input_ids'])} rows, {len(instructions or ())} texts), or build batches with "
                "Formatter(..., instructions=True)"
            )
        selection, images = self._kept(encoded, instructions or (), [row for row, _ in runs], self.spec)
        kept = inputs["input_ids"] != self.model.config.image_token_id
        for (row, run), (positions, _) in zip(runs, images, strict=True):
            kept[row, run[positions]] = True
        rewritten = shorten(inputs, kept, self.spec.position_policy, padding_side)
        return self._with_features(rewritten, encoded, [features for _, features in images], selection)

    def _with_features(
        self, inputs: dict[str, Any], encoded: Encoded, features: list[Tensor], selection: Selection | None
    ) -> Pruned:
        for name in self.family.drop:
            inputs.pop(name, None)
        output = copy.copy(encoded.output)
        output.pooler_output = features
        inputs["mm_encoder_outputs"] = {"image": output}
        return Pruned(inputs, selection, encoded, [len(rows) for rows in features])

    def _without_images(self, inputs: dict[str, Any]) -> Pruned:
        """Pass text through; in training, send zero tokens of a blank image along so that gradients and ranks agree."""
        if not (self.model.training and torch.is_grad_enabled()):
            return Pruned(inputs)
        encoded = self.family.encode(self.model, self.family.blank(self.model), self.pruner.needs)
        # Its crops may be fewer than a picture's; a method that merges must still merge, as on the other ranks.
        keep, count = self.spec.keep, encoded.tokens.count
        fits = keep if not isinstance(keep, int) or keep < count else max(count - 1, 1)
        _, images = self._kept(encoded, [""], [0], replace(self.spec, keep=fits, scope="item"))
        return self._with_features(dict(inputs), encoded, [images[0][1][:0]], None)

    def _kept(
        self, encoded: Encoded, instructions: Sequence[str], rows: list[int], spec: PruningSpec
    ) -> tuple[Selection, list[tuple[Tensor, Tensor]]]:
        """Prune the images of ``rows``: each image's kept placeholders (K,) and features (K, D)."""
        tokens = encoded.tokens
        if len(encoded.lengths) < len(encoded.owner):
            tokens = replace(tokens, image=torch.tensor(encoded.owner, device=tokens.features.device))
        if self.reads_text:
            tokens = with_text(tokens, self.pruner, self.text, instructions, [rows[image] for image in encoded.owner])
        selection = select(self.pruner, encoded, tokens, spec.keep, spec.scope)
        return selection, encoded.keep_of(selection, spec.newline)

    def forward(self, **inputs: Any) -> Any:
        """Run the stock model on pruned inputs and return its output; ``labels`` are shortened with the rest."""
        with self._running(self.prepare(inputs)) as pruned:
            return self.model(**pruned.inputs)

    def generate(self, **inputs: Any) -> Tensor:
        """Generate from pruned inputs and return the new tokens only, (B, T).

        ``inputs`` may hold generation options (``max_new_tokens`` and so on); they pass through to the stock method.
        """
        with torch.no_grad(), self._running(self.prepare(inputs, padding_side="left")) as pruned:
            output = self.model.generate(**pruned.inputs)
        return output[:, pruned.inputs["input_ids"].shape[1] :]

    @contextmanager
    def attach(self) -> Iterator[PrunedModel]:
        """While open, ``model(**processor_output)`` prunes by itself: for trainers that call the model."""
        handle = self.model.register_forward_pre_hook(self._hook, with_kwargs=True)
        try:
            yield self
        finally:
            handle.remove()

    @contextmanager
    def _running(self, pruned: Pruned) -> Iterator[Pruned]:
        self.last, self._prepared = pruned, True
        try:
            yield pruned
        finally:
            self._prepared = False

    def _hook(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if self._prepared:
            return None
        if args:
            raise PruningError("a model with an attached pruner takes keyword arguments only")
        if kwargs.get("mm_encoder_outputs"):
            raise PruningError(
                "these images were encoded before the pruner saw them, so the run would be unpruned; "
                "generate with PrunedModel.generate instead of model.generate"
            )
        self.last = self.prepare(kwargs)
        packed = self.packed and self.model.training and kwargs.get("labels") is not None
        return (), pack(self.last.inputs) if packed else self.last.inputs
