"""The generic family: any model that takes encoded images, admitted by comparison with itself on the user's batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from prunetune.pruning.errors import PruningError
from prunetune.pruning.families.base import Family, PrunedOutput, family_of, three_parts
from prunetune.pruning.types import VisualTokens
from prunetune.pruning.vision import Vision

PROJECTORS = (
    "multi_modal_projector",
    "visual.merger",
    "connector.modality_projection",
    "mm_projector",
    "merger",
    "embed_vision",
    "projector",
    "aligner",
)
"""Where the projector of a model may be, below ``model.``: the one of these that is there."""

_MODALITIES = ("image", "video")
_ALIGNED = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
# Of the sequence and not of its images, also where a function that encodes images names them.
_OF_THE_SEQUENCE = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", *_ALIGNED)
_NAMED = "prunetune_projector"  # on the model itself, so that its copies have it too


class Generic(Family):
    """What every model with ``mm_encoder_outputs`` has: features of its images, one row for each placeholder.

    Items are the entries of the model's ``pooler_output``: images, tiles or clips, whatever the model encodes one by
    one. Nothing is known of their grid, of the layers behind them or of their pixels, so methods see the projected
    features alone. :func:`generic_family` makes the class of a model, with the attributes that its functions tell.
    """

    name = "generic"
    model_types = ()
    unproven = True
    tower_features = False
    as_tensor: ClassVar[dict[str, bool]] = {}  # by modality: whether the model takes one tensor or a list

    def signals(self, model: nn.Module) -> frozenset[str]:
        """Offer nothing beside the features."""
        return frozenset()

    def frozen_parts(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Return all that is neither the language model nor the projector."""
        base: Any = model.base_model
        kept = {self.language_model, *(path.split(".")[0] for path in _projectors_there(base))}
        return tuple(module for name, module in base.named_children() if name not in kept)

    def encode(self, model: nn.Module, inputs: Mapping[str, Any], modality: str, needs: frozenset[str]) -> Vision:
        """Let the model encode what its own function names of the inputs."""
        encode = _encoder(model, modality)
        given = {name: inputs[name] for name in inspect.signature(encode).parameters if inputs.get(name) is not None}
        output = encode(**given, return_dict=True)
        features: Any = getattr(output, "pooler_output", None)
        if not _has_items(features):
            raise PruningError(
                f"{self._called(model)} returns {_shape(features)} for its {modality}s, where the generic family needs "
                "a list of (L, D), or (items, L, D); write a family for it: docs/adding.md"
            )
        self.as_tensor[modality] = isinstance(features, Tensor)
        slots = tuple(item.reshape(-1, item.shape[-1]) for item in features)  # (L, D) each
        groups, owners, origin = _by_length(slots)
        return Vision(
            modality=modality,
            groups=groups,
            owner=owners,
            slots=slots,
            origin=origin,
            levels=self._levels(model, output, slots),
        )

    def _levels(self, model: nn.Module, output: Any, slots: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
        """Return deepstack features: per level as many rows for each item as it has slots."""
        levels = getattr(output, "deepstack_features", None)
        if levels is None:
            return ()
        lengths = [len(item) for item in slots]
        for level in levels:
            # Granite's are pairs of a layer's number and a list, a tensor over all items can't be told apart.
            is_list = isinstance(level, list | tuple) and all(isinstance(item, Tensor) for item in level)
            if not is_list or [len(item) for item in level] != lengths:
                raise PruningError(
                    f"{self._called(model)} has deepstack features of a layout of its own, which the generic family "
                    "does not know how to cut; write a family for it: docs/adding.md"
                )
        return tuple(tuple(level) for level in levels)

    def token_id(self, model: nn.Module, modality: str) -> int:
        """Return the placeholder's token id.

        Raises:
            PruningError: if the configuration has none.
        """
        found = getattr(model.config, f"{modality}_token_id", None)
        if found is None:
            raise PruningError(
                f"the configuration of {self._called(model)} has no {modality}_token_id, by which the generic family "
                "finds placeholders; write a family for it: docs/adding.md"
            )
        return found

    def positions(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Return the positions of the full sequence: the model's own in three parts, where it counts so."""
        base: Any = model.base_model
        given_positions = inputs.get("position_ids")
        if not self.counts_rows_and_columns:
            return super().positions(model, inputs)
        if given_positions is not None:
            return three_parts(given_positions)
        given = {}
        for name in inspect.signature(base.get_rope_index).parameters:
            if inputs.get(name) is not None:
                given[name] = inputs[name]
        given.setdefault("mm_token_type_ids", self._kinds(model, inputs["input_ids"]))
        return base.get_rope_index(**given)[0]

    def _kinds(self, model: nn.Module, ids: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """Return 0 for text, 1 for images and 2 for videos, the codes of transformers' processors."""
        kinds = torch.zeros_like(ids)
        for code, modality in enumerate(_MODALITIES, start=1):
            if modality in self.pixels:
                kinds = kinds.masked_fill(ids == self.token_id(model, modality), code)
        return kinds

    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        """Refuse: what is known of a token is what came out of the projector.

        Raises:
            PruningError: always.
        """
        raise PruningError(
            f"{self._called(model)} runs in the generic family, which sees images after the projector only: stored "
            "images can't be projected anew; write a family for it: docs/adding.md"
        )

    def put_back(self, features: list[Tensor], levels: list[list[Tensor]], modality: str) -> PrunedOutput:
        """Return the features as the model's own encoder returned them: in a list, or as one tensor."""
        if self.as_tensor[modality]:
            return PrunedOutput(pooler_output=torch.cat(features), deepstack_features=levels or None)
        return super().put_back(features, levels, modality)

    def blank(self, model: nn.Module) -> dict[str, Tensor]:
        """Return one black image of the size that the configuration names, if the model takes such.

        Raises:
            PruningError: if it does not.
        """
        vision: Any = getattr(model.config, "vision_config", None)
        size = getattr(vision, "image_size", None)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        # Sizes, grids and masks of images differ from model to model; options of the layer to read have defaults.
        described_by = [name for name in self.replaced if not name.startswith("vision_feature")]
        if height is None or described_by or self.pixels.get("image") != "pixel_values":
            raise PruningError(
                f"{self._called(model)} runs in the generic family, which can't make a blank image for a training "
                "batch of text alone; leave samples without an image out, or write a family for it: docs/adding.md"
            )
        return {"pixel_values": next(model.parameters()).new_zeros(1, 3, height, width)}

    def _called(self, model: nn.Module) -> str:
        return f"model_type {model.config.model_type!r}"  # type: ignore[union-attr]


def name_projector(model: nn.Module, path: str) -> None:
    """Say which module is the projector, by its path below ``model.``, where the generic family has to guess.

    Raises:
        PruningError: if there is no such module, or the model's family knows its projector.
    """
    base: Any = model.base_model
    family = family_of(model)
    if not isinstance(family, Generic):
        raise PruningError(
            f"model.projector is for models without a family of their own; family {family.name!r} trains "
            f"{', '.join(family.projectors)}: leave it unset"
        )
    if not _is_module(base, path):
        raise PruningError(
            f"model.projector: there is no module {path!r} below the head; there are "
            f"{', '.join(name for name, _ in base.named_children())}"
        )
    setattr(model, _NAMED, path)


def can_be_generic(model: nn.Module) -> bool:
    """Return whether a model has what the generic family needs."""
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return False
    return any(_encoder(model, modality) is not None for modality in _MODALITIES)


def generic_family(model: nn.Module) -> Generic:
    """Return the generic family of one model, with what the signatures of its functions say."""
    base: Any = model.base_model
    pixels: dict[str, str] = {}
    replaced: list[str] = []
    functions = [_encoder(model, modality) for modality in _MODALITIES]
    for modality, encode in zip(_MODALITIES, functions, strict=True):
        names = list(inspect.signature(encode).parameters) if encode is not None else []
        main = [name for name in names if name.startswith("pixel_values")]
        if main:
            pixels[modality] = main[0]
        replaced += names
    rows_and_columns = hasattr(base, "get_rope_index")
    if rows_and_columns:  # they are given to the model, so what it would compute them of is not needed
        replaced += inspect.signature(base.get_rope_index).parameters
    read = {*inspect.signature(model.forward).parameters, *inspect.signature(base.forward).parameters}
    replaced = _of_images(replaced, pixels, rows_and_columns)
    aligned = [name for name in _ALIGNED if name in read and name not in replaced]
    made = type(
        "Generic",
        (Generic,),
        {
            "model_types": (model.config.model_type,),  # type: ignore[union-attr]
            "pixels": pixels,
            "replaced": tuple(replaced),
            "aligned": dict.fromkeys(aligned, 0),
            "unread": tuple(name for name in _ALIGNED if name not in {*aligned, *replaced}),
            "projectors": _Projectors(model),
            "language_model": "text_model" if hasattr(base, "text_model") else "language_model",
            "position_policies": ("original",) if rows_and_columns else ("compact", "original"),
            "counts_rows_and_columns": rows_and_columns,
            "as_tensor": {},
        },
    )
    return made()


def _of_images(names: list[str], pixels: Mapping[str, str], rows_and_columns: bool) -> list[str]:
    """Return the inputs that go with the pixels: no pixels themselves, and nothing of the sequence."""
    others = {*pixels.values(), *_OF_THE_SEQUENCE, "kwargs", "return_dict"}
    found = [name for name in dict.fromkeys(names) if name not in others]
    return [*found, "mm_token_type_ids"] if rows_and_columns else found


class _Projectors:
    """The attribute ``projectors`` of one model's family: looked for when it is asked for, since pruning needs none."""

    def __init__(self, model: nn.Module) -> None:
        base: Any = model.base_model
        self.named = getattr(model, _NAMED, None)
        self.there = _projectors_there(base)
        self.model_type = model.config.model_type  # type: ignore[union-attr]

    def __get__(self, family: Any, kind: Any = None) -> tuple[str, ...]:
        if self.named is not None:
            return (self.named,)
        if len(self.there) == 1:
            return self.there
        found = f"there are {' and '.join(self.there)}" if self.there else f"there is none of {', '.join(PROJECTORS)}"
        raise PruningError(
            f"which module of model_type {self.model_type!r} is the projector is not clear: {found}; name it as "
            "model.projector, by its path below model."
        )


def _projectors_there(base: nn.Module) -> tuple[str, ...]:
    return tuple(path for path in PROJECTORS if _is_module(base, path))


def _is_module(base: nn.Module, path: str) -> bool:
    try:
        base.get_submodule(path)
    except AttributeError:
        return False
    return True


def _encoder(model: nn.Module, modality: str) -> Any:
    return getattr(model.base_model, f"get_{modality}_features", None)


def _by_length(
    slots: tuple[Tensor, ...],
) -> tuple[tuple[VisualTokens, ...], tuple[tuple[int, ...], ...], tuple[Tensor, ...]]:
    """Return items (L, D) of one length together: the groups, the image of each of their items, and slots' tokens."""
    by_length: dict[int, list[int]] = {}
    for image, features in enumerate(slots):
        by_length.setdefault(len(features), []).append(image)
    groups, owners = [], []
    origin: list[Tensor] = list(slots)
    numbered = 0
    for length, images in by_length.items():
        features = torch.stack([slots[image] for image in images])  # (B, N, D)
        groups.append(VisualTokens(features=features, projected=features))
        owners.append(tuple(images))
        for image in images:
            origin[image] = torch.arange(numbered, numbered + length, device=features.device)
            numbered += length
    return tuple(groups), tuple(owners), tuple(origin)


def _has_items(features: Any) -> bool:
    return features.ndim > 2 if isinstance(features, Tensor) else isinstance(features, list | tuple)


def _shape(features: Any) -> str:
    return f"a tensor {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
