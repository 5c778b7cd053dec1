"""An arm: a loaded model with its pruner, projector, processor and device, and what identifies it."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from prunetune.assets import shipped
from prunetune.configs import ModelConfig
from prunetune.data_recipes.chat_templates import MODELS_OWN, template_file, template_text
from prunetune.data_recipes.formatting import Formatter
from prunetune.data_recipes.images import ImageOpener
from prunetune.data_recipes.sample import Sample
from prunetune.data_recipes.segments import MODELS_TOKENS
from prunetune.data_recipes.tokens import check_tokens
from prunetune.models.adapter import load_projector, projector_state
from prunetune.models.errors import CheckpointError
from prunetune.models.hashes import tensor_hash, text_tower_hash
from prunetune.models.loading import checkpoint_folder, load_model
from prunetune.models.profile import Profile, check_fitted_to, profile_of
from prunetune.models.ranks import launched_ranks
from prunetune.models.record import is_export, read_record
from prunetune.models.seal import short
from prunetune.models.stored import BaseHashes, base_hashes, settings_hash
from prunetune.pruning import Generated, PrunedModel, PruningSpec
from prunetune.pruning.elastic import ElasticModel
from prunetune.pruning.families import family_of, name_projector
from prunetune.pruning.fitting import unfitted
from prunetune.pruning.registry import method_of
from prunetune.pruning.rewrite import gathered_notes
from prunetune.pruning.stages.registry import stage_class
from prunetune.pruning.stored import StoredImages
from prunetune.pruning.text import instruction_text
from prunetune.screen import say

if TYPE_CHECKING:
    from prunetune.models.features import FeatureFormatter


Finish = Callable[[dict[str, Any]], dict[str, Any]]
"""Makes numbers of the pixels of a batch, where it is."""


@dataclass(frozen=True)
class Answer:
    """What an arm said to one sample.

    Attributes:
        id: the sample's.
        text: the new text, stripped.
        kept: how many visual tokens of the sample reached the LLM.
        kept_per_frame: of a video, how many of each frame did; None of an image, or of text alone.
        notes: what the method noted of the image or video by name, such as ``ran_dry``.
        layers: with stages inside the LLM, how many visual tokens each of its layers processed; else None.
    """

    id: str
    text: str
    kept: int
    kept_per_frame: tuple[int, ...] | None = None
    notes: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None


class Base:
    """A stock model as it was loaded, shared by all arms that are made of it; its files are hashed at most once."""

    def __init__(self, config: ModelConfig, device: torch.device | str) -> None:
        if config.template != MODELS_OWN:
            template_file(config.template)  # a wrong name stops here, before gigabytes are read
        self.config = config
        self.folder = checkpoint_folder(config.path, config.revision)
        quantization = config.quantization
        self.model, self.processor = load_model(
            config.path, config.revision, config.dtype, config.attention, quantization, device
        )
        if config.projector is not None:
            name_projector(self.model, config.projector)
        if quantization is None:  # quantised weights stay where they were loaded
            self.model.to(device)  # type: ignore[arg-type] # a string is as good as a device
        difference = check_tokens(self.processor, config.template, config.tokens, self.folder)
        if difference is not None and launched_ranks().is_zero:
            say(f"{config.path}: {difference}")
        self.told: set[str] = set()  # what was said once: methods that are not fitted to this model, and other words

    @cached_property
    def hashes(self) -> BaseHashes:
        """Of the stored weights: the frozen part, and the projector that the files hold."""
        return base_hashes(self.folder, family_of(self.model).projectors)

    @property
    def frozen_hash(self) -> str:
        """SHA-256 of all stored weights but the projector's, as records and manifests hold it."""
        return self.hashes.frozen_hash

    @property
    def exported(self) -> dict[str, Any] | None:
        """The record, where the checkpoint is an export of a tuned projector and no untouched base.

        Raises:
            CheckpointError: if it says that it is one, and its record is missing or was edited.
        """
        return read_record(self.folder) if is_export(self.folder) else None

    @cached_property
    def settings_hash(self) -> str:
        """SHA-256 of configuration, processor, tokenizer and template."""
        return settings_hash(self.folder)


@dataclass(frozen=True, eq=False)
class Arm:
    """A model with its pruner and projector, ready to run.

    Everything that runs a model does it through an arm, so that all of them load, place and format alike. Arms made of
    one another by :meth:`with_pruning` and :meth:`with_adapter` share the base's weights.

    Attributes:
        base: the stock model.
        pruned: the pruner on the model; ``pruned.model`` is the base's, or a copy that differs in its projector.
        spec: the pruning as it was asked for.
        adapter: folder of the recalibrated projector; None is training-free.
        profile: what ``spec.profile`` holds; None if it names none.
    """

    base: Base
    pruned: PrunedModel
    spec: PruningSpec
    adapter: str | None = None
    profile: Profile | None = None

    @classmethod
    def load(
        cls,
        model: ModelConfig,
        pruning: PruningSpec | None = None,
        adapter: str | Path | None = None,
        device: torch.device | str | None = None,
    ) -> Arm:
        """Load a model and put it on a device.

        Args:
            model: which, and how it is loaded.
            pruning: pruner and budget; None keeps everything.
            adapter: folder written by a recalibration.
            device: None is the GPU of this process, or the CPU where there is none.

        Raises:
            CheckpointError: if the model can't be loaded, or the adapter belongs to another base or misses tensors.
            PruningError: if the model does not offer what the pruner reads, or the profile is another model's.
        """
        if device is None:
            device = default_device()
        if pruning is None:
            pruning = PruningSpec()
        profile_of(pruning)  # a wrong one stops here, before gigabytes are read
        return cls._of(Base(model, device), pruning, adapter)

    @classmethod
    def _of(cls, base: Base, spec: PruningSpec, adapter: str | Path | None) -> Arm:
        if adapter is None:
            return cls._with(base, base.model, spec, None)
        model = with_own_projector(base.model)
        load_projector(model, adapter, base.hashes)
        _say_another_dtype(adapter, base.config.dtype)
        _say_another_choice(adapter, spec)
        _say_another_quantization(adapter, base.config.quantization)
        return cls._with(base, model, spec, str(adapter))

    @classmethod
    def _with(cls, base: Base, model: PreTrainedModel, spec: PruningSpec, adapter: str | None) -> Arm:
        """Return an arm of a loaded model, whose text tower and profile are its own."""
        profile = profile_of(spec)
        runs = spec if profile is None else profile.fill(spec)
        original = _original_of(base) if spec.choose_with == "original" else None
        arm = cls(
            base, PrunedModel(model, _with_paths(runs), base.processor.tokenizer, original), spec, adapter, profile
        )
        arm._check_text_tower()
        if profile is not None:
            check_fitted_to(profile, str(spec.profile), base.hashes, base.settings_hash, arm.text_tower_hash)
        arm._say_unfitted()
        return arm

    def with_pruning(self, spec: PruningSpec) -> Arm:
        """Return an arm of the same weights with another pruner or budget."""
        return self._with(self.base, self.model, spec, self.adapter)

    def untouched(self) -> Arm:
        """Return an arm that keeps all visual tokens, with a projector of its own, which stays as it is now.

        Every other weight is shared, so it is to be made before PEFT or DeepSpeed have the model.
        """
        return self._with(self.base, with_own_projector(self.model), PruningSpec(), self.adapter)

    @property
    def pruning(self) -> PruningSpec:
        """The pruning as it runs, and as records hold it: with the options of the profile filled in."""
        return self.spec if self.profile is None else self.profile.fill(self.spec)

    def elastic(self, settings: Sequence[PruningSpec]) -> Arm:
        """Return the same arm, whose batches may name one of these settings for each row, see :class:`ElasticModel`.

        Raises:
            PruningError: if the model does not offer what one of the pruners reads.
        """
        model, tokenizer = self.model, self.processor.tokenizer
        own = [_with_paths(setting) for setting in settings]
        return replace(self, pruned=ElasticModel(model, self.pruned.spec, own, tokenizer, self.pruned.original))

    def _say_unfitted(self) -> None:
        """Say it once if a method runs with defaults that belong to its paper's model."""
        self._say_unfitted_stages()
        name = self.spec.pruner
        options = unfitted(method_of(name).fits, self.pruned.pruner, self.pruning.options)
        if not options or name in self.base.told or not launched_ranks().is_zero:
            return
        self.base.told.add(name)
        defaults = ", ".join(f"{option} {getattr(self.pruned.pruner, option)}" for option in options)
        say(
            f"{name} runs with its published {defaults}, not fitted to {self.base.config.path}; `prunetune calibrate` "
            "fits it, pruning.profile names the result"
        )

    def _say_unfitted_stages(self) -> None:
        """Say it once of a stage that withdraws all tokens at its paper's layer, which is that of another model."""
        for stage in self.pruning.stages:
            own = stage_class(stage.name)
            if stage.boundaries is None and own.drops_all:
                layers = ", ".join(map(str, own.boundaries))
                self._say_once(
                    f"{stage.name} runs with its published layer {layers}, not fitted to {self.base.config.path}; "
                    "`prunetune calibrate` fits it, pruning.profile names the result"
                )

    def check_shares_prefix(self) -> None:
        """Check that :meth:`answer` can share prefixes, and say it once where it rarely will.

        Raises:
            PruningError: in one line, for a model that can't.
        """
        self.pruned.check_shares_prefixes()
        if self.pruned.reads_text:
            self._say_once(
                f"share_prefix: {self.spec.pruner} reads the question, so that questions of one image share a prefix "
                "only where they keep the same tokens"
            )

    def _say_once(self, words: str) -> None:
        """Say something of this base's arms, once."""
        if words not in self.base.told and launched_ranks().is_zero:
            self.base.told.add(words)
            say(words)

    def _check_text_tower(self) -> None:
        """Check that the text tower is the one that the adapter was recalibrated with, where both read one."""
        if self.adapter is None:
            return
        expected = read_record(self.adapter).get("text_tower_hash")
        if expected is not None and self.text_tower_hash not in (None, expected):
            raise CheckpointError(
                f"projector {self.adapter} was recalibrated with another text tower: {short(expected)}, "
                f"{self.spec.text_tower!r} is {short(self.text_tower_hash)}; set pruning.text_tower to its own"
            )

    def with_adapter(self, adapter: str | Path | None) -> Arm:
        """Return an arm with the projector of an adapter, or with the base's own; every other weight is shared.

        Raises:
            CheckpointError: if the adapter belongs to another base, or misses tensors.
        """
        return self._of(self.base, self.spec, adapter)

    @property
    def model(self) -> PreTrainedModel:
        """The stock model with this arm's projector."""
        return self.pruned.model

    @property
    def processor(self) -> ProcessorMixin:
        """The model's Hugging Face processor."""
        return self.base.processor

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @cached_property
    def projector_hash(self) -> str:
        """SHA-256 of the projector's tensors as they are loaded."""
        return tensor_hash(projector_state(self.model))

    @cached_property
    def text_tower_hash(self) -> str | None:
        """SHA-256 of the text tower that the pruner reads and of its tokenizer; None if it reads none."""
        return text_tower_hash(self.pruned.text) if self.pruned.reads_text_tower else None

    @property
    def template(self) -> str:
        """The source of the chat template that prompts are made with."""
        return template_text(self.processor, self.base.config.template)

    @property
    def template_hash(self) -> str:
        """SHA-256 of the chat template, and of ``model.tokens`` where it is named: the prompt's tokens follow both."""
        tokens = self.base.config.tokens
        named = "" if tokens == MODELS_TOKENS else f"\nmodel.tokens {tokens}"
        return hashlib.sha256(f"{self.template}{named}".encode()).hexdigest()

    def formatter(self, images: ImageOpener, max_length: int | None = None, raw_pixels: bool = False) -> Formatter:
        """Return what turns samples into batches for this arm.

        Args:
            images: opens the samples' images.
            max_length: longest sequence in tokens, None for no limit.
            raw_pixels: hand pictures over as uint8 where that is exact; ``finish`` of the formatter then belongs to
                every batch, after it was moved and before its pixels are cast.
        """
        config = self.base.config
        read = instruction_text if self.pruned.reads_text else None
        return Formatter(
            self.processor,
            images,
            config.template,
            config.square,
            max_length,
            instructions=read,
            raw_pixels=raw_pixels,
            tokens=config.tokens,
        )

    def place(self, batch: Mapping[str, Any], finish: Finish | None = None) -> dict[str, Any]:
        """Return a batch on the arm's device, pixels in the model's dtype, see :func:`placed`."""
        return placed(batch, self.device, self.model.dtype, finish)

    def answer(
        self,
        formatter: Formatter | FeatureFormatter,
        samples: Sequence[Sample],
        max_new_tokens: int,
        share_prefix: bool = False,
    ) -> list[Answer]:
        """Return the greedy answers to one batch of samples, which are one question each.

        Args:
            formatter: made by :meth:`formatter` for the samples' images, or a ``FeatureFormatter`` of this arm.
            samples: the last turn of each is a question without an answer.
            max_new_tokens: longest answer in tokens.
            share_prefix: compute what questions about one image begin with once, see `PrunedModel.generate_shared`.
        """
        with torch.inference_mode():
            inputs = self.place(formatter.prompt_batch(samples))
            if share_prefix:
                images = [sample.image for sample in samples]
                generated = self.pruned.generate_shared(
                    **inputs, images=images, max_new_tokens=max_new_tokens, do_sample=False
                )
                if generated.why_whole is not None:
                    self._say_once(f"share_prefix: some batches are computed without it: {generated.why_whole}")
            else:
                generated = self.pruned.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self.answers(samples, generated, generated.tokens)

    def answer_static(
        self,
        formatter: Formatter | FeatureFormatter,
        samples: Sequence[Sample],
        max_new_tokens: int,
        compiled: bool = True,
    ) -> list[Answer]:
        """Return what :meth:`answer` does, generated into a cache of one size, see `PrunedModel.generate_static`.

        Args:
            formatter: as of :meth:`answer`.
            samples: the last turn of each is a question without an answer.
            max_new_tokens: longest answer in tokens.
            compiled: whether the steps behind the prompts are compiled.
        """
        with torch.inference_mode():
            inputs = self.place(formatter.prompt_batch(samples))
            generated = self.pruned.generate_static(
                **inputs, max_new_tokens=max_new_tokens, compiled=compiled, do_sample=False
            )
        return self.answers(samples, generated, generated.tokens)

    def answers(
        self, samples: Sequence[Sample], generated: Generated, tokens: Tensor | Sequence[Sequence[int]]
    ) -> list[Answer]:
        """Return what was generated for samples as answers.

        Args:
            samples: the batch.
            generated: what was kept of its images.
            tokens: the new tokens of each row.
        """
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        kept = [0] * len(samples)
        notes: list[list[Mapping[str, float]]] = [[] for _ in samples]
        for modality, rows in generated.rows.items():
            # By row: where every tile counts as an image, a sample has several.
            for image, row in enumerate(rows):
                kept[row] += generated.kept[modality][image]
                notes[row].append(generated.notes[modality][image])
        frames: dict[int, tuple[int, ...]] = {}
        videos = generated.rows.get("video", [])
        for row, counts in zip(videos, generated.kept_per_frame, strict=True):
            frames[row] = (*frames.get(row, ()), *counts)
        answers = []
        for row, (sample, text) in enumerate(zip(samples, texts, strict=True)):
            layers = tuple(generated.layers[row]) if generated.layers else None
            noted = gathered_notes(notes[row])
            answers.append(Answer(sample.id, text.strip(), kept[row], frames.get(row), noted, layers))
        return answers


def placed(
    batch: Mapping[str, Any], device: torch.device, dtype: torch.dtype, finish: Finish | None = None
) -> dict[str, Any]:
    """Return a batch on a device, pixels in a dtype; ids and masks keep their kind.

    Args:
        batch: of a formatter.
        device: where it goes. It is not waited for: pinned memory is copied while the model runs.
        dtype: the model's.
        finish: the formatter's, of batches that may hold pixels as bytes; None where none does.
    """
    moved = {}
    for name, value in batch.items():
        moved[name] = value.to(device, non_blocking=True) if isinstance(value, (Tensor, StoredImages)) else value
    inputs = moved if finish is None else finish(moved)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            inputs[name] = value.to(dtype)
    return inputs


def _say_another_dtype(adapter: str | Path, dtype: str) -> None:
    """Say it once if a projector runs in another dtype than it was trained in; scores shift with it."""
    trained = read_record(adapter).get("trained_in", dtype)
    if trained != dtype and launched_ranks().is_zero:
        say(f"projector {adapter} was trained in {trained} and runs in {dtype} here; set model.dtype to {trained}")


def _say_another_choice(adapter: str | Path, spec: PruningSpec) -> None:
    """Say it once if tokens are chosen by another projector than in training; methods that read none are the same."""
    trained = (read_record(adapter).get("pruning") or {}).get("choose_with", "tuned")
    if trained != spec.choose_with and spec.pruner != "identity" and launched_ranks().is_zero:
        say(
            f"projector {adapter} was trained on tokens that the {trained} projector chose, and the {spec.choose_with} "
            f"one chooses here, where a method reads it; set pruning.choose_with to {trained}"
        )


def _say_another_quantization(adapter: str | Path, quantization: str | None) -> None:
    """Say it once if a projector runs on a base of other bits than it was trained on: its inputs' use differs."""
    trained = (read_record(adapter).get("model") or {}).get("quantization")
    if trained != quantization and launched_ranks().is_zero:
        say(
            f"projector {adapter} was trained on a base with quantization {trained}, and runs on one with "
            f"{quantization} here; set model.quantization to {trained or 'null'}"
        )


def default_device() -> str:
    """Return this process's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return "cpu"
    local = os.environ.get("LOCAL_RANK", "0")  # the launcher's; without one there is one process
    return f"cuda:{local}"


def _with_paths(spec: PruningSpec) -> PruningSpec:
    # A shipped name becomes a path here and not in the specification, which records keep as it was written.
    if spec.text_tower is None:
        return spec
    return spec.model_copy(update={"text_tower": shipped(spec.text_tower)})


def _original_of(base: Base) -> PreTrainedModel:
    """Return the base with a projector of its own, which no training changes."""
    if base.exported is not None:
        raise CheckpointError(
            f"{base.config.path} is an export, which holds the tuned projector alone, and pruning.choose_with: "
            "original chooses by the one before; load the base with the adapter, or set choose_with to tuned"
        )
    return with_own_projector(base.model)


def with_own_projector(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the modules that shares every tensor with ``model`` but the projector's."""
    own = {id(tensor) for tensor in projector_state(model, keep_vars=True).values()}
    # deepcopy takes what its memo holds as copied already: 30 arms of a 7B model hold its weights once.
    shared = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in own:
            shared[id(tensor)] = tensor
    return copy.deepcopy(model, shared)
