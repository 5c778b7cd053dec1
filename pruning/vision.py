"""The images or videos of a batch after the model's own encoding, as data that can be stored, moved and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from prunetune.pruning.errors import PruningError
from prunetune.pruning.types import VisualTokens

NEWLINE = -1
"""Stands in ``Vision.origin`` for a slot that is no visual token, such as the end of a row."""


@dataclass(frozen=True)
class Vision:
    """One modality of a batch: the tokens that a pruner chooses from, and the slots they fill in the LLM's sequence.

    Tokens are numbered through all groups: those of the first group's first item come first, 0 to N - 1.

    Attributes:
        modality: "image" or "video".
        groups: the items that a pruner sees (images, crops, frames), those with one grid together.
        owner: for each group the image that each of its items belongs to; all items of an image are in one group.
        slots: for each image the features (L, D) of its placeholders, unpruned, in the order of its placeholders.
        origin: for each image (L,) the number of the token behind each slot, or ``NEWLINE``.
        row: for each image (L,) the row of the image that each slot lies in or ends, -1 for none; empty where the
            family has no row ends.
        levels: for models with deepstack features, per level and image (L, D); they are cut with the slots.
        level_features: what was projected to ``levels``, per level and image (L, C); empty where nothing projects them.
        sources: for families that pool behind the projector, what they make slots of under another projector.
    """

    modality: str
    groups: tuple[VisualTokens, ...]
    owner: tuple[tuple[int, ...], ...]
    slots: tuple[Float[Tensor, "_L D"], ...]
    origin: tuple[Int[Tensor, " _L"], ...]
    row: tuple[Int[Tensor, " _L"], ...] = ()
    levels: tuple[tuple[Float[Tensor, "_L D"], ...], ...] = ()
    level_features: tuple[tuple[Float[Tensor, "_L _C"], ...], ...] = ()
    sources: Mapping[str, Shaped[Tensor, ...]] = field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        """How many placeholders each image has."""
        return [len(features) for features in self.slots]

    @property
    def total(self) -> int:
        """How many tokens there are in all groups, T."""
        total = 0
        for group in self.groups:
            items, count = group.features.shape[:2]
            total += items * count
        return total

    @property
    def cut_up(self) -> bool:
        """Whether some image has several items, such as crops."""
        # Only then do a budget per item and one per image differ.
        return any(len(set(owner)) < len(owner) for owner in self.owner)

    def features(self) -> Float[Tensor, "T C"]:
        """Return what enters the projector, (T, C), of the tokens of all groups by their numbers."""
        return torch.cat([group.features.flatten(0, 1) for group in self.groups])

    def numbers(self) -> list[Int[Tensor, "_B _N"]]:
        """Return for each group the numbers (B, N) of its tokens.

        Groups of 1 item with 2 tokens and of 2 items with 3 give ``[[0, 1]]`` and ``[[2, 3, 4], [5, 6, 7]]``.
        """
        numbers, first = [], 0
        for group in self.groups:
            items, count = group.features.shape[:2]
            block = torch.arange(first, first + items * count, device=group.features.device)
            numbers.append(block.view(items, count))
            first += items * count
        return numbers

    def map(self, change: Callable[[Tensor], Tensor]) -> Vision:
        """Return the same images with every tensor changed."""

        def changed(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(map(change, tensors))

        return replace(
            self,
            groups=tuple(group.map(change) for group in self.groups),
            slots=changed(self.slots),
            origin=changed(self.origin),
            row=changed(self.row),
            levels=tuple(map(changed, self.levels)),
            level_features=tuple(map(changed, self.level_features)),
            sources={name: change(tensor) for name, tensor in self.sources.items()},
        )

    def projected_by(
        self, project: Callable[[Tensor], Tensor], project_level: Callable[[int, Tensor], Tensor] | None = None
    ) -> Vision:
        """Return the same images after a projector; row ends do not go through it.

        Args:
            project: from pre-projector features (T, C), one per token, to the LLM's space (T, D).
            project_level: the same of a deepstack level by its number, (S, C) to (S, D), one per slot; None leaves
                levels as they are.
        """
        sizes = [group.features.shape[:2] for group in self.groups]
        tokens = project(self.features())
        parts = tokens.split([items * count for items, count in sizes])
        groups = []
        for group, part, size in zip(self.groups, parts, sizes, strict=True):
            groups.append(replace(group, projected=part.unflatten(0, size)))
        slots = []
        for features, origin in zip(self.slots, self.origin, strict=True):
            is_token = (origin != NEWLINE)[:, None]
            slots.append(torch.where(is_token, tokens[origin.clamp(min=0)], features))
        levels = self.levels
        if self.level_features and project_level is not None:
            made = [project_level(number, torch.cat(own)) for number, own in enumerate(self.level_features)]
            levels = tuple(level.split(self.lengths) for level in made)
        return replace(self, groups=tuple(groups), slots=tuple(slots), levels=levels)

    def unprojected(self) -> Vision:
        """Return the same images without projected tokens, which nothing can be chosen by then."""
        return replace(self, groups=tuple(replace(group, projected=None) for group in self.groups))

    def to(self, device: torch.device | str) -> Vision:
        """Return the same images on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def save(self, path: str | Path) -> None:
        """Write the images to a file, from the CPU and without their graph."""
        # A cache written on one GPU is read on another, or on none.
        torch.save(self.map(lambda tensor: tensor.detach().cpu()), path)

    @staticmethod
    def load(path: str | Path) -> Vision:
        """Read what :meth:`save` wrote; nothing but tensors and these classes is ever built from the file.

        Raises:
            PruningError: if the file holds something else, or was written before images had all their present fields.
        """
        try:
            with torch.serialization.safe_globals([Vision, VisualTokens]):
                vision = torch.load(path, weights_only=True)
        # torch.load raises many things for a broken file, and which ones changes from release to release.
        except Exception as error:
            raise PruningError(f"{path} holds no encoded images: {error}") from error
        if not isinstance(vision, Vision):
            raise PruningError(f"{path} holds no encoded images, but a {type(vision).__name__}")
        for part in (vision, *vars(vision).get("groups", ())):
            # Reading builds no object anew, so what a release had not yet is not there, whatever its default is.
            missing = [field.name for field in fields(part) if field.name not in vars(part)]
            if missing:
                raise PruningError(
                    f"{path} was written by another release, whose encoded images have no {', '.join(missing)}; encode "
                    "the images again"
                )
        return vision


def of_equal_images(tokens: VisualTokens, modality: str = "image") -> Vision:
    """Return B images of which each is one item, and each token one slot."""
    assert tokens.projected is not None  # every family fills it
    images, count, _ = tokens.projected.shape
    # Token i of an image fills its placeholder i, so slots and tokens have one order.
    numbers = torch.arange(images * count, device=tokens.projected.device).view(images, count)  # (B, N)
    return Vision(
        modality=modality,
        groups=(tokens,),
        owner=(tuple(range(images)),),
        slots=tuple(tokens.projected),
        origin=tuple(numbers),
    )
