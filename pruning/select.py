"""What a pruner chooses from, and its choice: per item, or per image over the pooled tokens of its items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from prunetune.pruning.budget import Budget, resolve_budget
from prunetune.pruning.errors import PruningError
from prunetune.pruning.ops.precision import exact_float32
from prunetune.pruning.registry import registered_methods
from prunetune.pruning.signals import of_source, signal_of
from prunetune.pruning.types import Pruner, Selection, VisualTokens
from prunetune.pruning.vision import NEWLINE, Vision


@dataclass(frozen=True)
class Candidates:
    """G items, or G images with the tokens of their items pooled, from which a pruner chooses.

    Attributes:
        tokens: (G, P) tokens.
        numbers: (G, P) the number of each among all tokens of its ``Vision``.
        images: the image that each of the G belongs to.
    """

    tokens: VisualTokens
    numbers: Int[Tensor, "G P"]
    images: tuple[int, ...]


def candidates(vision: Vision, scope: str) -> list[Candidates]:
    """Return what the pruner chooses from: the items, or with scope "image" each image's tokens together."""
    found: list[Candidates] = []
    for tokens, numbers, owner in zip(vision.groups, vision.numbers(), vision.owner, strict=True):
        several = len(set(owner)) < len(owner)  # some image has more than one item
        if several and scope == "image":
            found += _pooled(vision, tokens, owner, first=int(numbers[0, 0]))
            continue
        # Some methods scale their scores over all crops of an image, as their published code does.
        if several:
            tokens = replace(tokens, image=_counted(owner, tokens.features.device))
        found.append(Candidates(tokens, numbers, owner))
    return found


def _counted(owner: tuple[int, ...], device: torch.device) -> Int[Tensor, " B"]:
    """Return the images of a group's items numbered from 0, (B,): ``(5, 5, 2)`` gives ``[0, 0, 1]``."""
    number_of: dict[int, int] = {}
    numbers = [number_of.setdefault(image, len(number_of)) for image in owner]
    return torch.tensor(numbers, device=device)


def _pooled(vision: Vision, tokens: VisualTokens, owner: tuple[int, ...], first: int) -> list[Candidates]:
    """Return each image's tokens that the LLM would see as one item; images with equally many go together.

    Args:
        vision: the images.
        tokens: one of its groups, (B, N).
        owner: the image of each of the B items.
        first: the number of the group's first token.
    """
    # Images with equally many tokens are one batch: a pruner runs once per size and not once per image.
    by_size: dict[int, dict[int, Tensor]] = {}
    for image in dict.fromkeys(owner):
        numbers = vision.origin[image]  # (L,)
        pool = numbers[numbers != NEWLINE].sort().values  # padding that the model cuts away is in no slot
        by_size.setdefault(len(pool), {})[image] = pool
    found = []
    for _, pools in sorted(by_size.items()):
        numbers = torch.stack(list(pools.values()))  # (G, P)
        items = torch.tensor([owner.index(image) for image in pools], device=numbers.device)
        pooled = _gathered(tokens, numbers - first, items)
        found.append(Candidates(pooled, numbers, tuple(pools)))
    return found


def _gathered(
    tokens: VisualTokens,
    indices: Int[Tensor, "G P"],
    items: Int[Tensor, " G"],
) -> VisualTokens:
    """Return the tokens at ``indices`` (G, P), counted through all B * N, as G items with P tokens each and no grid.

    Of 2 items with 3 tokens, ``[[1, 3, 5]]`` is one item: token 1 of the first, tokens 0 and 2 of the second.

    Args:
        tokens: (B, N) items.
        indices: (G, P).
        items: (G,) one item of each image, for what belongs to images as a whole.
    """

    def per_token(values: Shaped[Tensor, "B N *rest"]) -> Shaped[Tensor, "G P *rest"]:
        return values.flatten(0, 1)[indices]

    signals = {}
    for name, values in tokens.signals.items():
        axes = signal_of(name).axes
        if axes == "B H N":
            signals[name] = per_token(values.transpose(1, 2)).transpose(1, 2)
        elif signal_of(name).per_token:
            signals[name] = per_token(values)
        else:
            signals[name] = values[items]
    return VisualTokens(
        features=per_token(tokens.features),
        projected=None if tokens.projected is None else per_token(tokens.projected),
        signals=signals,
        layers=tokens.layers,
    )


def check_poolable(pruner: Pruner) -> None:
    """Check that a method can choose over the pooled items of an image.

    Raises:
        PruningError: if it reads something of which every item has its own.
    """
    read = of_source(pruner.needs, "attention", "reader", "output")
    own = [need for need in read if not signal_of(need).per_token]
    if own:
        raise PruningError(
            f"{type(pruner).__name__} reads {', '.join(own)}, of which every item has its own, so one budget "
            "over all crops of an image is undefined; set pruning.scope to item"
        )


@torch.no_grad()
def choose(pruner: Pruner, among: Candidates, keep: Budget, small_images: str, names: Mapping[int, str]) -> Selection:
    """Let the pruner choose; the choice itself carries no gradient.

    Args:
        pruner: the method.
        among: the candidates, with all signals that the method reads.
        keep: the budget of each of them.
        small_images: what happens if there are fewer tokens than the budget: "stop" or "keep_all".
        names: what to call an image in a message.

    Raises:
        PruningError: if the budget does not fit.
    """
    tokens = among.tokens
    # A share of the tokens always fits; only a number can exceed them.
    if isinstance(keep, int) and keep > tokens.count and small_images == "keep_all":
        keep = tokens.count
    try:
        number = resolve_budget(keep, tokens.count)
    except PruningError as error:
        image = among.images[0]
        raise PruningError(f"{names.get(image, f'image {image} of the batch')}: {error}") from None
    # Under autocast, or with TF32 products, the same image would keep other tokens in training than in evaluation.
    with exact_float32(tokens.features.device):
        return pruner(tokens, number)


def check_signals(pruner: Pruner, vision: frozenset[str], text: frozenset[str], tower: str) -> None:
    """Check that everything a pruner reads can be computed.

    Args:
        pruner: the method.
        vision: vision signals of the model.
        text: text signals that the reader offers.
        tower: the vision tower's model type, for the message.

    Raises:
        PruningError: naming what is missing, and what works or what to set.
    """
    name = type(pruner).__name__
    missing = _seen(pruner) - vision
    if missing:
        works = []
        for other, method in registered_methods().items():
            if _seen(method.pruner()) <= vision:
                works.append(other)
        raise PruningError(
            f"{name} reads {', '.join(sorted(missing))}, which the vision tower {tower!r} does not offer (for [CLS] "
            "signals it needs a [CLS] token that does not enter the projector; for reader signals, a layer after "
            f"vision_feature_layer). Methods that work there with their default options: {', '.join(works)}"
        )
    asked = [signal_of(need) for need in of_source(pruner.needs, "text")]
    lacking = [signal for signal in asked if signal.name not in text]
    if any(signal.space == "clip" for signal in lacking):
        raise PruningError(
            f"{name} compares visual tokens with text in CLIP's space, and LLaVA checkpoints have no text tower: set "
            "pruning.text_tower to the CLIP checkpoint its vision tower comes from, a folder or an id such as "
            "openai/clip-vit-large-patch14-336"
        )
    if lacking:
        raise PruningError(f"{name} reads the instruction's tokens: give PrunedModel the model's tokenizer")


def _seen(pruner: Pruner) -> set[str]:
    """Return the signals that a method reads of the vision side."""
    needs = of_source(pruner.needs, "attention", "reader", "output", "pixels")
    return {signal_of(need).name for need in needs}
