"""Images of a feature cache: what a pruner and budget kept of each, to be projected as the projector is now."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunetune.pruning.budget import Budget, keeps_all
from prunetune.pruning.errors import PruningError
from prunetune.pruning.spec import PruningSpec


@dataclass(frozen=True)
class StoredImages:
    """What stays of the images of a batch, in reading order; :class:`~prunetune.models.features.FeatureStore` gives it.

    Attributes:
        rows: (M, C) pre-projector features of the slots that stay, merged ones included, without row ends.
        stays: (S,) which of all images' slots stay.
        lengths: how many placeholders each image has; they add up to S.
        ends: (E,) which of the K staying slots are row ends; K = M + E.
        newline: (D,) what stands in a row end; None in families without row ends.
        choices: for each image the pruner and budget that chose, see :func:`choice_of`.
        notes: for each image what the method noted of it by name.
        modality: of the images.
        items: for each image of how many items alike its placeholders are, token by token, and the rows and columns of
            their grid; zeros where that is not so, or not known: from such an image nothing can be chosen anew.
    """

    rows: Float[Tensor, "M C"]
    stays: Bool[Tensor, " S"]
    lengths: tuple[int, ...]
    ends: Int[Tensor, " E"]
    newline: Float[Tensor, " D"] | None
    choices: tuple[Mapping[str, Any], ...]
    notes: tuple[Mapping[str, float], ...]
    modality: str = "image"
    items: tuple[tuple[int, int, int], ...] = ()

    def features(self, project: Callable[[Tensor], Tensor]) -> Float[Tensor, "K D"]:
        """Return the features (K, D) of all staying slots in the LLM's space, with the graph of the projector.

        Args:
            project: from pre-projector features (M, C) to (M, D); it is called once, also of no rows at all.
        """
        projected = project(self.rows)
        if not len(self.ends):
            return projected
        assert self.newline is not None  # the store has one where there are row ends
        count = len(projected) + len(self.ends)
        is_token = torch.ones(count, dtype=torch.bool, device=projected.device)
        is_token[self.ends] = False
        # A look-up and no assignment: of row ends, which are all alike, any row before them stands in for the graph.
        source = (is_token.long().cumsum(dim=0) - 1).clamp(min=0)
        if not len(projected):
            return self.newline.to(projected).expand(count, -1)
        return torch.where(is_token[:, None], projected[source], self.newline.to(projected))

    def map(self, change: Callable[[Tensor], Tensor]) -> StoredImages:
        """Return the same images with every tensor changed."""
        newline = None if self.newline is None else change(self.newline)
        return replace(self, rows=change(self.rows), stays=change(self.stays), ends=change(self.ends), newline=newline)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StoredImages:
        """Return the same images on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> StoredImages:
        """Return the same images in pinned memory; data loaders call this."""
        return self.map(lambda tensor: tensor.pin_memory())


def choice_of(spec: PruningSpec, keep: Budget | None = None) -> dict[str, Any]:
    """Return everything in a specification that decides which tokens of an image are kept, as JSON values.

    The method's options are those that run, defaults included: another default of another release is another choice.
    All ways to ask for all tokens are one choice.

    Args:
        spec: with the options of its profile filled in.
        keep: another budget than the specification's.

    Raises:
        PruningError: for an unknown name, option or budget.
    """
    budget = spec.keep if keep is None else keep
    if spec.pruner == "identity" and spec.newline != "none" and keeps_all(budget):
        return dict(_ALL_TOKENS)
    pruner: Any = spec.build()
    values = {
        "pruner": spec.pruner,
        "options": {field.name: getattr(pruner, field.name) for field in dataclasses.fields(pruner)},
        "keep": budget,
        "scope": spec.scope,
        "small_images": spec.small_images,
        "newline": spec.newline,
    }
    if spec.choose_with != "tuned":  # caches of before this was a choice stay as they are
        values["choose_with"] = spec.choose_with
    # Through JSON once, so that what was read from a file compares equal: tuples are lists there.
    choice: dict[str, Any] = json.loads(json.dumps(values, sort_keys=True, default=str))
    return choice


_ALL_TOKENS = {
    "pruner": "identity",
    "options": {},
    "keep": "100%",
    "scope": "item",
    "small_images": "stop",
    "newline": "rows",
}


def is_all_tokens(choice: Mapping[str, Any]) -> bool:
    """Return whether a choice is to keep every token."""
    return choice == _ALL_TOKENS


def told_choice(choice: Mapping[str, Any]) -> str:
    """Return a choice for people: ``divprune 16``, ``all tokens``."""
    if is_all_tokens(choice):
        return "all tokens"
    by = " (chosen with the original projector)" if choice.get("choose_with") == "original" else ""
    return f"{choice['pruner']} {choice['keep']}{by}"


def differing(choice: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Return the names of the parts in which two choices differ."""
    names = dict.fromkeys([*asked, *choice])
    return [name for name in names if choice.get(name) != asked.get(name)]


def another_choice(choice: Mapping[str, Any], asked: Mapping[str, Any]) -> PruningError:
    """Return the error of an image that was chosen from by another pruner or budget than runs."""
    name = differing(choice, asked)[0]
    return PruningError(
        f"the stored features are those that {told_choice(choice)} keeps, and {told_choice(asked)} runs: "
        f"{name} is {choice.get(name)!r} there and {asked.get(name)!r} here; take those of this pruning"
    )
