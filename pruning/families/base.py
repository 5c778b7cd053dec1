"""What a family is, and how the family of a model is found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from prunetune.plugins import import_folder, load_installed
from prunetune.pruning.errors import PruningError
from prunetune.pruning.families.tiling import Tiling
from prunetune.pruning.hooks import stood_in
from prunetune.pruning.vision import Vision


@dataclass
class PrunedOutput(ModelOutput):
    """Encoded images as a stock model takes them in ``mm_encoder_outputs``; its type says that they were pruned here.

    Attributes:
        pooler_output: the features of all images, in the container that the model expects.
        deepstack_features: per level the features of all images, or None.
    """

    pooler_output: Any = None
    deepstack_features: Any = None


class Family(ABC):
    """A model family: how its images are encoded, and what of its inputs follows the visual tokens.

    The defaults are those of a family with plain positions whose projector is one module; a family is one file that
    overrides what differs.

    Attributes:
        name: the name of the command line.
        model_types: values of ``config.model_type`` it covers.
        pixels: for each modality the input that holds it.
        replaced: further inputs that describe pixels; pruning removes them with the pixels.
        aligned: inputs (B, L) beside ids, mask, labels and positions that are cut with the sequence, and the value that
            padding gets; the model reads them, so a batch with images must have them.
        unread: inputs (B, L) that a processor may return and the model does not read; they are left out.
        projectors: projector modules below the conditional-generation model, by their path from ``model.``.
        language_model: path of the language model.
        one_tensor: modalities of which the model takes all features in one tensor (1, K, D), and not in a list.
        frames_are_images: whether videos reach the model as images, one a frame, so that it has no modality of them.
        item: what an item is, and so what a budget per item counts for: "image", "crop" or "frame".
        former_names: inputs that older processors call otherwise, by that name.
        position_policies: those that make sense; the first is what ``position_policy: auto`` means.
        counts_rows_and_columns: whether positions have three parts (M-RoPE): time, row and column.
        tower_features: whether the features are the tower's, which enter the projector; else they have left it.
        projects_tokens: whether the projector is one module that maps each token for itself, (..., C) to (..., D), and
            every slot but row ends holds the projection of its token.
        unproven: whether a model is compared with the stock one on the first batch before anything is pruned.
        causal: whether the model reads a prompt from left to right, images aside, which may see themselves both ways:
            what a prompt begins with is then the same whatever follows.
        sees_both_ways: whether tokens of an image see those behind them.
        first_position: where plain positions begin; stock generation adds it by itself, so it is given them from 0.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    pixels: ClassVar[Mapping[str, str]] = {"image": "pixel_values"}
    replaced: ClassVar[tuple[str, ...]] = ("image_sizes",)
    aligned: ClassVar[Mapping[str, int]] = {}
    unread: ClassVar[tuple[str, ...]] = ()
    projectors: ClassVar[tuple[str, ...]] = ("multi_modal_projector",)
    language_model: ClassVar[str] = "language_model"
    one_tensor: ClassVar[tuple[str, ...]] = ()
    frames_are_images: ClassVar[bool] = False
    item: ClassVar[str] = "image"
    former_names: ClassVar[Mapping[str, str]] = {}
    position_policies: ClassVar[tuple[str, ...]] = ("compact", "original")
    counts_rows_and_columns: ClassVar[bool] = False
    tower_features: ClassVar[bool] = True
    projects_tokens: ClassVar[bool] = False
    unproven: ClassVar[bool] = False
    causal: ClassVar[bool] = True
    sees_both_ways: ClassVar[bool] = False
    first_position: ClassVar[int] = 0

    @abstractmethod
    def signals(self, model: nn.Module) -> frozenset[str]:
        """Return the vision signals that a model offers."""

    @abstractmethod
    def encode(self, model: nn.Module, inputs: Mapping[str, Any], modality: str, needs: frozenset[str]) -> Vision:
        """Run the stock encoder on one modality of a batch and read the signals in ``needs``."""

    @abstractmethod
    def blank(self, model: nn.Module) -> dict[str, Tensor]:
        """Return inputs of one dummy image, so that a batch of text alone still reaches the projector in training."""

    def blank_of(self, model: nn.Module, modality: str) -> dict[str, Tensor]:
        """Return inputs of one dummy image or clip; override it where clips take other pixels than images."""
        if modality == "image":
            return self.blank(model)
        renamed = {}
        for name, value in self.blank(model).items():
            other = self.pixels[modality] if name == self.pixels["image"] else name.replace("image", modality)
            if other in {self.pixels[modality], *self.replaced}:
                renamed[other] = value
        return renamed

    def frozen_parts(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Return the modules of the vision side that must behave in training as they do in inference."""
        base: Any = model.base_model
        return (base.vision_tower,)

    def vision_layers(self, model: nn.Module) -> int:
        """Return how many vision layers there are up to the one whose output enters the projector."""
        vision: Any = model.config.vision_config  # type: ignore[union-attr]
        count: int = vision.depth if hasattr(vision, "depth") else vision.num_hidden_layers
        layer = getattr(model.config, "vision_feature_layer", -1)
        if not isinstance(layer, int):  # several layers side by side: the last named counts
            layer = layer[-1]
        return count + 1 + layer if layer < 0 else layer

    def llm(self, model: nn.Module) -> Any:
        """Return the language model, without its head."""
        base: Any = model.base_model
        return base.get_submodule(self.language_model)

    def token_ids(self, model: nn.Module) -> list[int]:
        """Return the placeholders' token ids of all modalities."""
        return [self.token_id(model, modality) for modality in self.pixels]

    def left_out(self) -> list[str]:
        """Return the inputs that the model does not read; what is cut with the sequence it does read."""
        return [name for name in self.unread if name not in self.aligned]

    def renamed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return inputs under their present names, without those that are None."""
        # Trainers pass None for what a batch has not; a key that is there would be taken for an input.
        return {self.former_names.get(key, key): value for key, value in inputs.items() if value is not None}

    def token_id(self, model: nn.Module, modality: str) -> int:
        """Return the placeholder's token id."""
        return getattr(model.config, f"{modality}_token_id")

    def positions(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Return the positions of the full sequence: (B, L), or (3, B, L) for rotary positions in three parts."""
        if inputs.get("position_ids") is not None:
            return inputs["position_ids"]
        return (inputs["attention_mask"].long().cumsum(dim=1) - 1).clamp(min=0) + self.first_position

    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        """Return pre-projector features (K, C), one per LLM token, in LLM space (K, D)."""
        base: Any = model.base_model
        return base.get_submodule(self.projectors[0])(features)

    @contextmanager
    def without_projector(self, model: nn.Module) -> Iterator[None]:
        """While open, the projector gives zeros of the right shape; for families with ``projects_tokens``."""
        base: Any = model.base_model
        config: Any = model.config

        def nothing(features: Tensor) -> Tensor:
            return features.new_zeros(()).expand(*features.shape[:-1], config.text_config.hidden_size)

        with stood_in(base.get_submodule(self.projectors[0]), nothing):
            yield

    def project_level(self, model: nn.Module, level: int, features: Tensor) -> Tensor:
        """Return what enters a deepstack level's projector, (K, C), in LLM space (K, D)."""
        raise NotImplementedError(f"family {self.name!r} has no deepstack levels")

    def reproject(self, model: nn.Module, vision: Vision) -> Vision:
        """Return stored images as the projector of now sees them, bit for bit as :meth:`encode` would.

        A family whose model pools or interpolates behind the projector makes its slots anew from ``Vision.sources``:
        what was projected before the projector was tuned must not be used in silence.
        """
        return vision.projected_by(partial(self.project, model), partial(self.project_level, model))

    def tilings(
        self, model: nn.Module, processor: Any, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]]
    ) -> list[Tiling] | None:
        """Return how each picture of a prompt was cut into items, in their order; None where no item is a tile.

        Args:
            model: the stock model.
            processor: the model's.
            inputs: what it returned for one prompt.
            sizes: height and width of the prompt's pictures as it was given them.
        """
        return None

    def put_back(self, features: list[Tensor], levels: list[list[Tensor]], modality: str) -> PrunedOutput:
        """Return the features of every image or video (K, D), and of every level, as the model takes them."""
        if modality in self.one_tensor:
            return PrunedOutput(pooler_output=torch.cat(features)[None])
        return PrunedOutput(pooler_output=features, deepstack_features=levels or None)


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Add a family.

    Raises:
        PruningError: if its name or one of its model types is taken.
    """
    taken = {model_type for known in _FAMILIES.values() for model_type in known.model_types} | set(_FAMILIES)
    for name in {family.name, *family.model_types}:
        if name in taken:
            raise PruningError(f"model family {family.name!r}: {name!r} is registered already")
    _FAMILIES[family.name] = family
    return family


def registered_families() -> dict[str, Family]:
    """Return all families by name: those of ``pruning/families/`` and of plug-ins."""
    import prunetune.pruning.families as package

    import_folder(package)
    load_installed()
    return dict(sorted(_FAMILIES.items()))


def family_of(model: nn.Module) -> Family:
    """Return the family of a Hugging Face model; where none covers its ``config.model_type``, the generic one.

    Raises:
        PruningError: if the generic one does not fit either, with what to do.
    """
    from prunetune.pruning.families.generic import can_be_generic, generic_family

    families = registered_families()
    model_type = model.config.model_type  # type: ignore[union-attr]
    for family in families.values():
        if model_type in family.model_types:
            return family
    if can_be_generic(model):
        return generic_family(model)
    covered = ", ".join(t for family in families.values() for t in family.model_types)
    raise PruningError(
        f"no model family covers model_type {model_type!r}, and the generic one needs a model with get_image_features "
        f"whose forward takes mm_encoder_outputs; there are {covered}. A new family is one file: docs/adding.md"
    )


def three_parts(positions: Tensor) -> Tensor:
    """Return the parts (3, B, L) of M-RoPE positions; stock generation puts a row before them that counts tokens.

    Raises:
        PruningError: for positions of another shape.
    """
    if positions.ndim != 3 or len(positions) not in (3, 4):
        raise PruningError(
            f"`position_ids` must be (3, batch, length), of time, row and column, or (4, batch, length) with the count "
            f"of tokens first, got {tuple(positions.shape)}; leave them out, and the model's own are used"
        )
    return positions[-3:]


def stacked(features: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Return equally long images as one tensor (B, N, D)."""
    return features if isinstance(features, Tensor) else torch.stack(list(features))
