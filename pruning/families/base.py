"""What a family says of itself, and how the family of a model is found."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruning.types import PruningError, Selection, VisualTokens

NEWLINE_POLICIES = ("rows", "all", "none")


@dataclass(frozen=True)
class Encoded:
    """Images after the model's own encoding, ready to be pruned.

    Attributes:
        output: what ``get_image_features`` returned; its ``pooler_output`` holds the projected tokens.
        tokens: the items the pruner sees: images, or the crops of all images.
        lengths: placeholders per image, in the order the images appear in the batch.
        owner: the image that each item belongs to.
        keep_of: maps a selection and a newline policy to each image's kept
            ``(positions in its placeholder run (K,), features (K, D))``.
        pools: returns for each image the tokens (P,) that the LLM would see of it, as ``item * N + position``,
            ascending: what a budget per image chooses from.
    """

    output: Any
    tokens: VisualTokens
    lengths: list[int]
    owner: list[int]
    keep_of: Callable[[Selection, str], list[tuple[Tensor, Tensor]]]
    pools: Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Family:
    """A model family as a record.

    Attributes:
        name: the name of the command line.
        model_types: values of ``config.model_type`` it covers.
        projectors: projector modules below the conditional-generation model, by their path from ``model.``.
        language_model: path of the language model.
        drop: model inputs that pruning replaces and therefore removes.
        item: what an item is, and so what a budget per item counts for: "image" or "crop".
        signals: the vision signals that a model offers.
        encode: runs the stock encoder, with the signals a method needs.
        blank: inputs of one dummy image, so that a batch of text alone still reaches the projector in training.
    """

    name: str
    model_types: tuple[str, ...]
    projectors: tuple[str, ...]
    language_model: str
    drop: tuple[str, ...]
    item: str
    signals: Callable[[nn.Module], frozenset[str]]
    encode: Callable[[nn.Module, Mapping[str, Any], frozenset[str]], Encoded]
    blank: Callable[[nn.Module], dict[str, Tensor]]


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
    """Return all families by name, importing every file of ``pruning/families/`` once."""
    import pruning.families as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"pruning.families.{module.name}")
    return dict(sorted(_FAMILIES.items()))


def family_of(model: nn.Module) -> Family:
    """Return the family of a Hugging Face model.

    Raises:
        PruningError: if no family covers its ``config.model_type``.
    """
    families = registered_families()
    model_type = model.config.model_type  # type: ignore[union-attr]
    for family in families.values():
        if model_type in family.model_types:
            return family
    covered = ", ".join(t for family in families.values() for t in family.model_types)
    raise PruningError(
        f"no model family covers model_type {model_type!r}; there are {covered}. "
        "A new one is one file in pruning/families/"
    )


def project_kept(selection: Selection, tokens: VisualTokens, projector: nn.Module) -> list[Tensor]:
    """Return each item's kept tokens in LLM space, (K_b, D): gathered, or projected anew where they were merged."""
    if selection.merged is not None:  # in one call: under ZeRO-3 all ranks must call the projector equally often
        return list(projector(torch.cat(selection.merged)).split([len(features) for features in selection.merged]))
    assert tokens.projected is not None  # every family fills it
    if isinstance(selection.indices, Tensor):
        index = selection.indices[..., None].expand(-1, -1, tokens.projected.shape[-1])
        return list(tokens.projected.gather(1, index))
    return [tokens.projected[item, indices] for item, indices in enumerate(selection.indices)]


def stack_projected(pooler_output: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Return equally long projected items as one tensor (B, N, D)."""
    return pooler_output if isinstance(pooler_output, Tensor) else torch.stack(list(pooler_output))
