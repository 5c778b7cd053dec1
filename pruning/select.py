"""Between encoding and shortening: add the text signals, and let the pruner choose per item or per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from pruning.budget import Budget, resolve_budget
from pruning.families.base import Encoded
from pruning.precision import exact_float32
from pruning.registry import registered_methods
from pruning.text import TextReader
from pruning.types import TEXT_SIGNALS, VISION_SIGNALS, Pruner, PruningError, Selection, VisualTokens, signal_name

SCOPES = ("item", "image")
_PER_TOKEN = {"features", "projected", "keys", "reader_attention", "reader_keys", "image_embeds"}
_PER_HEAD_AND_TOKEN = {"cls_attention", "received_attention", "object_attention"}
_PER_IMAGE = {"text_embeds", "general_embeds", "text_token_embeds", "general_token_embeds"}


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
    needs = {signal_name(need) for need in pruner.needs}
    name = type(pruner).__name__
    if missing := (needs & VISION_SIGNALS) - vision:
        works = [
            other
            for other, method in registered_methods().items()
            if {signal_name(need) for need in method.needs} & VISION_SIGNALS <= vision
        ]
        raise PruningError(
            f"{name} reads {', '.join(sorted(missing))}, which the vision tower {tower!r} does not offer (for [CLS] "
            "signals it needs a [CLS] token that does not enter the projector; for reader signals, a layer after "
            f"vision_feature_layer). Methods that work there with their default options: {', '.join(works)}"
        )
    missing = (needs & TEXT_SIGNALS) - text
    if missing & {"image_embeds", "text_embeds", "general_embeds"}:
        raise PruningError(
            f"{name} compares visual tokens with text in CLIP's space, and LLaVA checkpoints have no text tower: set "
            "pruning.text_tower to the CLIP checkpoint its vision tower comes from, a folder or an id such as "
            "openai/clip-vit-large-patch14-336"
        )
    if missing:
        raise PruningError(f"{name} reads the instruction's tokens: give PrunedModel the model's tokenizer")


def with_text(
    tokens: VisualTokens, pruner: Pruner, reader: TextReader, instructions: Sequence[str], rows: Sequence[int]
) -> VisualTokens:
    """Return the items with the text signals that the pruner needs.

    Args:
        tokens: B items.
        pruner: the method.
        reader: computes the signals.
        instructions: one text per row of the batch.
        rows: the row that each item belongs to, (B,).
    """
    wanted = {signal_name(need) for need in pruner.needs} & TEXT_SIGNALS
    found: dict[str, Any] = {}
    where = torch.tensor(list(rows), device=tokens.features.device)
    prompts = list(getattr(pruner, "general_prompts", ()))
    if "image_embeds" in wanted:
        found["image_embeds"] = reader.image_embeds(tokens.features)
    if "text_embeds" in wanted:
        found["text_embeds"] = reader.text_embeds(instructions)[where]
    if "general_embeds" in wanted:
        found["general_embeds"] = reader.prompt_embeds(prompts, "clip").expand(len(where), -1, -1)
    if "text_token_embeds" in wanted:
        found["text_token_embeds"] = reader.token_embeds(instructions)[where]
    if "general_token_embeds" in wanted:
        found["general_token_embeds"] = reader.prompt_embeds(prompts, "llm").expand(len(where), -1, -1)
    return replace(tokens, layers={**tokens.layers, "image_embeds": "CLIP's visual projection"}, **found)


@torch.no_grad()
def select(pruner: Pruner, encoded: Encoded, tokens: VisualTokens, keep: Budget, scope: str) -> Selection:
    """Let the pruner choose; the choice itself carries no gradient.

    Args:
        pruner: the method.
        encoded: the images.
        tokens: their items with all signals.
        keep: the budget, counted per item or per image.
        scope: "item" prunes every item (crop) on its own; "image" pools all items of an image.

    Raises:
        PruningError: if the budget does not fit, or the method can't choose over several items.
    """
    with exact_float32(tokens.features.device):
        if scope == "image" and len(encoded.lengths) < len(tokens.features):
            return _per_image(pruner, encoded.pools(), encoded.owner, tokens, keep)
        return pruner(tokens, resolve_budget(keep, tokens.count))


def _per_image(pruner: Pruner, pools: list[Tensor], owner: list[int], tokens: VisualTokens, keep: Budget) -> Selection:
    """Choose from each image's pool of tokens; images with equally large pools go together."""
    unfit = {signal_name(need) for need in pruner.needs} - _PER_TOKEN - _PER_HEAD_AND_TOKEN - _PER_IMAGE - {"image_key"}
    if unfit:
        raise PruningError(
            f"{type(pruner).__name__} reads {', '.join(sorted(unfit))}, of which every item has its own, so one budget "
            "over all crops of an image is undefined; set pruning.scope to item"
        )
    kept: list[Tensor] = [torch.empty(0, dtype=torch.long, device=tokens.features.device)] * len(owner)
    merged: list[Tensor] = [tokens.features[0, :0]] * len(owner)
    merges = False
    for size in sorted({len(pool) for pool in pools}):
        images = [image for image, pool in enumerate(pools) if len(pool) == size]
        pool = torch.stack([pools[image] for image in images])
        first = [owner.index(image) for image in images]
        chosen = pruner(_pooled(tokens, pool, first), resolve_budget(keep, size))
        merges = merges or chosen.merged is not None
        for group, image in enumerate(images):
            slots, order = pool[group][chosen.slots_of(group)].sort()  # each output sits where it was made around
            features = tokens.features.flatten(0, 1)[slots] if chosen.merged is None else chosen.merged[group][order]
            numbers = torch.bincount(slots // tokens.count, minlength=len(owner)).tolist()
            pieces, parts = (slots % tokens.count).split(numbers), features.split(numbers)
            for item in range(len(owner)):
                if owner[item] == image:
                    kept[item], merged[item] = pieces[item], parts[item]
    return Selection(kept, merged if merges else None, kept if merges else None)


def _pooled(tokens: VisualTokens, pool: Tensor, first: list[int]) -> VisualTokens:
    """Return the tokens at ``pool`` (G, P), places among all B * N, as G items with P tokens each and no grid."""
    signals: dict[str, Any] = {}
    for field in fields(tokens):
        value = getattr(tokens, field.name)
        if not isinstance(value, Tensor):
            continue
        if field.name in _PER_TOKEN:
            signals[field.name] = value.flatten(0, 1)[pool]
        elif field.name in _PER_HEAD_AND_TOKEN:
            signals[field.name] = value.transpose(1, 2).flatten(0, 1)[pool].transpose(1, 2)
        elif field.name in _PER_IMAGE or field.name == "image_key":
            signals[field.name] = value[first]
    return VisualTokens(**signals, layers=tokens.layers)
