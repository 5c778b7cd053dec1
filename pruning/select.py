"""What a pruner chooses from, and its choice: per item, or per image over the pooled tokens of its items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from prunetune.pruning.budget import BudgetRule
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
        modality: "image" or "video".
        pooled: whether each of the G is all that there is of its image or video.
    """

    tokens: VisualTokens
    numbers: Int[Tensor, "G P"]
    images: tuple[int, ...]
    modality: str = "image"
    pooled: bool = False

    def rows(self, rows: Sequence[int]) -> Candidates:
        """Return some of the G, in the order of ``rows``."""
        if list(rows) == list(range(len(self.images))):
            return self
        at = torch.tensor(rows, device=self.numbers.device)
        images = tuple(self.images[row] for row in rows)
        tokens = self.tokens.map(lambda values: values[at])
        if tokens.image is not None:
            tokens = replace(tokens, image=_counted(images, at.device))
        return replace(self, tokens=tokens, numbers=self.numbers[at], images=images)


def candidates(vision: Vision, scope: str, clips: bool = False) -> list[Candidates]:
    """Return what the pruner chooses from: the items, or with scope "image" each image's tokens together.

    Args:
        vision: the images or videos.
        scope: "item" or "image".
        clips: whether the method sees whole videos, whatever the scope is.
    """
    found: list[Candidates] = []
    clips = clips and vision.modality == "video"
    for tokens, numbers, owner in zip(vision.groups, vision.numbers(), vision.owner, strict=True):
        several = len(set(owner)) < len(owner)  # some image has more than one item
        if several and (scope == "image" or clips):
            found += _pooled(vision, tokens, owner, first=int(numbers[0, 0]), clips=clips)
            continue
        # Some methods scale their scores over all crops of an image, as their published code does.
        if several:
            tokens = replace(tokens, image=_counted(owner, tokens.features.device))
        found.append(Candidates(tokens, numbers, owner, vision.modality, pooled=scope == "image" or clips))
    return found


def _counted(owner: tuple[int, ...], device: torch.device) -> Int[Tensor, " B"]:
    """Return the images of a group's items numbered from 0, (B,): ``(5, 5, 2)`` gives ``[0, 0, 1]``."""
    number_of: dict[int, int] = {}
    numbers = [number_of.setdefault(image, len(number_of)) for image in owner]
    return torch.tensor(numbers, device=device)


def _pooled(vision: Vision, tokens: VisualTokens, owner: tuple[int, ...], first: int, clips: bool) -> list[Candidates]:
    """Return each image's tokens that the LLM would see as one item; images with equally many go together.

    Args:
        vision: the images.
        tokens: one of its groups, (B, N).
        owner: the image of each of the B items.
        first: the number of the group's first token.
        clips: whether the pool is a clip, with its frames' grid and what belongs to each frame.
    """
    # Images with equally many tokens are one batch: a pruner runs once per size and not once per image.
    by_size: dict[int, dict[int, Tensor]] = {}
    own_items: dict[int, list[int]] = {}
    for item, image in enumerate(owner):
        own_items.setdefault(image, []).append(item)
    for image in dict.fromkeys(owner):
        numbers = vision.origin[image]  # (L,)
        pool = numbers[numbers != NEWLINE].sort().values  # padding that the model cuts away is in no slot
        by_size.setdefault(len(pool), {})[image] = pool
    found = []
    for _, pools in sorted(by_size.items()):
        numbers = torch.stack(list(pools.values()))  # (G, P)
        items = [own_items[image] for image in pools]
        frames = len(items[0]) if vision.modality == "video" else 1
        if frames > 1 and numbers.shape[1] != frames * tokens.count:
            raise PruningError(
                f"a video of {frames} frames with {tokens.count} tokens each fills {numbers.shape[1]} placeholders, so "
                "its frames are not alike; prune it with scope: item and a method for images"
            )
        if clips:
            at = torch.tensor(items, device=numbers.device)  # (G, F)
            pooled = replace(_gathered(tokens, numbers - first, at), grid=tokens.grid)
        else:
            firsts = [own[0] for own in items]
            pooled = _gathered(tokens, numbers - first, torch.tensor(firsts, device=numbers.device))
        found.append(Candidates(replace(pooled, frames=frames), numbers, tuple(pools), vision.modality, pooled=True))
    return found


def _gathered(
    tokens: VisualTokens,
    indices: Int[Tensor, "G P"],
    items: Int[Tensor, "G ..."],
) -> VisualTokens:
    """Return the tokens at ``indices`` (G, P), counted through all B * N, as G items with P tokens each and no grid.

    Of 2 items with 3 tokens, ``[[1, 3, 5]]`` is one item: token 1 of the first, tokens 0 and 2 of the second.

    Args:
        tokens: (B, N) items.
        indices: (G, P).
        items: (G,) one item of each image, for what belongs to images as a whole; (G, F) the frames of each clip.
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
        elif signal_of(name).source == "text":
            signals[name] = values[items if items.ndim == 1 else items[:, 0]]  # all items have their image's
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
    read = of_source(pruner.needs, "attention", "reader", "output", "head")
    own = [need for need in read if not signal_of(need).per_token]
    if own:
        raise PruningError(
            f"{type(pruner).__name__} reads {', '.join(own)}, of which every item has its own, so one budget "
            "over all crops of an image is undefined; set pruning.scope to item"
        )


def budgets(among: Candidates, rule: BudgetRule, names: Mapping[int, str]) -> list[int]:
    """Return how many tokens each candidate keeps.

    Args:
        among: the candidates.
        rule: the budget.
        names: what to call an image in a message.

    Raises:
        PruningError: if the budget does not fit, naming the image.
    """
    tokens = among.tokens
    found: dict[int, list[int]] = {}
    for image in dict.fromkeys(among.images):
        frames = among.images.count(image)
        try:
            if among.modality == "video" and among.pooled:
                own = [rule.of_clip(image, tokens.frames, tokens.per_frame)]
            elif among.modality == "video":
                own = rule.of_frames(image, frames, tokens.count)
            else:
                own = [rule.of_item(tokens.count)] * frames
        except PruningError as error:
            name = names.get(image, f"{among.modality} {image} of the batch")
            raise PruningError(f"{name}: {error}") from None
        found[image] = own
    return [found[image].pop(0) for image in among.images]


@torch.no_grad()
def choose(
    pruner: Pruner,
    seen: Candidates,
    rule: BudgetRule,
    names: Mapping[int, str],
    among: Candidates | None = None,
) -> list[tuple[Candidates, Selection]]:
    """Let the pruner choose, those with one budget together; the choice itself carries no gradient.

    Args:
        pruner: the method.
        seen: the candidates, with all signals that the method reads.
        rule: the budget of each of them.
        names: what to call an image in a message.
        among: the same candidates as they are handed on, where the method sees them through another projector.

    Raises:
        PruningError: if the budget does not fit.
    """
    among = seen if among is None else among
    numbers = budgets(among, rule, names)
    found = []
    for number in sorted(set(numbers)):
        # With all items of their images, over which some methods scale their scores, also where their budgets differ.
        images = {image for image, own in zip(among.images, numbers, strict=True) if own == number}
        rows = [row for row, image in enumerate(among.images) if image in images]
        part = seen.rows(rows)
        # Under autocast, or with TF32 products, the same image would keep other tokens in training than in evaluation.
        with exact_float32(part.tokens.features.device):
            selection = pruner(part.tokens, number)
        own_rows = [row for row, whole in enumerate(rows) if numbers[whole] == number]
        of_these = [rows[row] for row in own_rows]
        found.append((among.rows(of_these), selection.rows(own_rows)))
    return found


def seconds_of(vision: Vision, inputs: Mapping[str, Any], seconds: Sequence[float | None]) -> list[float]:
    """Return how long each video is, in reading order; nothing where that is unknown, or these are images.

    Args:
        vision: the videos.
        inputs: the processor's, of which ``second_per_grid_ts`` says how long a frame of tokens is.
        seconds: as the batch says, before all else.

    Raises:
        PruningError: if the batch says it of another number of videos, or of some alone.
    """
    if vision.modality != "video":
        return []
    per_frame = inputs.get("second_per_grid_ts")
    if len(seconds) == 0 and per_frame is not None:
        frames = [0] * len(vision.slots)
        for owner in vision.owner:
            for image in owner:
                frames[image] += 1
        if len(per_frame) != len(frames):
            raise PruningError(
                f"`second_per_grid_ts` is of {len(per_frame)} videos, and the batch has {len(frames)}; give it as the "
                "processor returned it, one number per video"
            )
        seconds = [float(length) * number for length, number in zip(per_frame, frames, strict=True)]
    if len(seconds) not in (0, len(vision.slots)):
        raise PruningError(
            f"`video_seconds` says how long {len(seconds)} videos are, and the batch has {len(vision.slots)}"
        )
    known = [float(length) for length in seconds if length is not None]
    if len(known) != len(seconds):
        raise PruningError(
            f"`video_seconds` is {list(seconds)!r}: give one number per video, or leave it out where some are unknown"
        )
    return known


def check_videos(name: str, sees_clips: bool, family: str, modalities: Iterable[str]) -> None:
    """Check that a method for videos meets a family that has any.

    Raises:
        PruningError: if not: most would keep every image whole under a pruner's name.
    """
    if sees_clips and "video" not in modalities:
        raise PruningError(
            f"{name} compares the frames of a video, and family {family!r} takes no videos; choose a method for images "
            "(`prunetune list pruners` says which are)"
        )


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
    needs = of_source(pruner.needs, "attention", "reader", "output", "head", "pixels")
    return {signal_of(need).name for need in needs}
