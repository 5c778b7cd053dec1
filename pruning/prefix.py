"""What the prompts about one image begin with, computed once: their keys and values go to all of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from prunetune.pruning.errors import PruningError
from prunetune.pruning.families.base import Family, PrunedOutput
from prunetune.pruning.rewrite import Pruned, in_blocks

SHORTEST = 8
"""Tokens from which on prompts of text alone share what they begin with."""

_ONE_ROW_EACH = {"num_beams": 1, "num_return_sequences": 1}
"""Generation options under which stock generation repeats rows, but not a cache that it is given."""


@dataclass(frozen=True)
class Prompt:
    """One row of a batch, without padding.

    Attributes:
        ids: its token ids, of which pruning has left the kept ones.
        visual: how many of them end with the last visual token; 0 of text alone.
        key: what rows with the same prefix agree in, beside their ids; it says which tokens are kept of which image.
    """

    ids: list[int]
    visual: int
    key: Hashable


@dataclass(frozen=True)
class Group:
    """Rows whose prompts begin alike.

    Attributes:
        rows: their numbers; the first one's visual tokens stand for all.
        length: how many tokens are the same, visual ones included; of each row at least one more is left.
    """

    rows: tuple[int, ...]
    length: int


@dataclass(frozen=True)
class SharedPrompts:
    """A batch whose prefixes were computed.

    A row of a prefix ``a b`` and the rest ``f g`` beside rows with longer ones stands in the columns
    ``a b . . | . f g``: what is left of the bar is in the cache, and a dot is hidden by the mask.

    Attributes:
        inputs: for stock generation: ids, mask, cache, and positions where the prompts have their own.
        width: columns of the prompts.
        prefixes: how many prefixes were computed.
    """

    inputs: dict[str, Any]
    width: int
    prefixes: int


def check_shares(model: PreTrainedModel, family: Family, options: Mapping[str, Any] | None = None) -> None:
    """Check that keys and values of a prefix are the same whatever follows it, and that generation takes them.

    Args:
        model: the stock model.
        family: its family.
        options: of generation.

    Raises:
        PruningError: in one line, for what can't share a prefix.
    """
    todo = "; set share_prefix: false"
    if family.unproven:
        raise PruningError(
            f"model_type {model.config.model_type!r} has no family of its own, and nobody has looked whether its "
            f"prompts are read from left to right, so that a prefix can be computed before what follows{todo}"
        )
    if not family.causal:
        raise PruningError(
            f"family {family.name!r} can't share a prefix: its images see the question behind them, so that their keys "
            f"and values are another for each question{todo}"
        )
    for layer in _cache(model).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise PruningError(
                f"model_type {model.config.model_type!r} can't share a prefix: its {type(layer).__name__} is no "
                f"cache of keys and values{todo}"
            )
    asked = dict(options or {})
    config = model.generation_config
    for name, only in _ONE_ROW_EACH.items():
        value = asked.get(name, getattr(config, name, None))
        if value not in (None, only):
            raise PruningError(f"{name}: {value} repeats rows, and a shared prefix is not repeated with them{todo}")
    if asked.get("use_cache", True) is False:
        raise PruningError(f"use_cache: False leaves no cache that could hold a shared prefix{todo}")
    kind = asked.get("cache_implementation", getattr(config, "cache_implementation", None))
    if kind not in (None, "dynamic", "hybrid"):  # the last two mean what None does
        raise PruningError(f"a shared prefix is held in a dynamic cache, and cache_implementation is {kind!r}{todo}")
    if asked.get("past_key_values") is not None:
        raise PruningError(f"past_key_values hold another prefix, beside which none can be shared{todo}")


def grouped(prompts: Sequence[Prompt]) -> list[Group] | None:
    """Return rows by the prefix that they share, each row in one group; None if sharing would save nothing.

    Prompts ``a i i b c`` and ``a i i b d`` about one image i share ``a i i b``. A row that shares with nobody is a
    group of its own, and at least its visual tokens are its prefix.
    """
    found: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        if len(prompt.ids) <= max(prompt.visual, 1):
            return None  # nothing is left behind the visual tokens, from which the answer would go on
        # Up to the last visual token the ids must agree, or the prefix would not hold the image.
        found.setdefault((prompt.key, tuple(prompt.ids[: prompt.visual])), []).append(row)
    groups: list[Group] = []
    alone: list[int] = []
    for rows in found.values():
        length = _common([prompts[row].ids for row in rows])
        if len(rows) > 1 and (prompts[rows[0]].visual or length >= SHORTEST):
            groups.append(Group(tuple(rows), length))
        else:
            alone += rows
    if not groups:
        return None
    rest = max(len(prompts[row].ids) - group.length for group in groups for row in group.rows)
    for row in alone:
        # Not more than others have left, so that they are not padded to it.
        length = max(prompts[row].visual, len(prompts[row].ids) - rest, 1)
        groups.append(Group((row,), length))
    groups.sort(key=lambda group: group.rows[0])  # visual tokens come in the order of the rows
    rest = max(len(prompts[row].ids) - group.length for group in groups for row in group.rows)
    columns = len(groups) * max(group.length for group in groups) + len(prompts) * rest
    plain = len(prompts) * max(len(prompt.ids) for prompt in prompts)
    return groups if columns < plain else None


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Return how many ids all rows begin with, so that of each at least one is left."""
    shortest = min(len(row) for row in rows) - 1
    for place in range(shortest):
        if any(row[place] != rows[0][place] for row in rows):
            return place
    return shortest


def prompts_of(
    pruned: Pruned,
    input_ids: Int[Tensor, "B L"],
    attention_mask: Shaped[Tensor, "B L"],
    visual: Sequence[int],
    images: Sequence[Hashable],
    by_features: bool,
) -> list[Prompt]:
    """Return the rows of a pruned batch, and what their prefixes depend on.

    Args:
        pruned: the batch, padded on the left.
        input_ids: (B, L) of the batch before pruning.
        attention_mask: its mask.
        visual: the ids of placeholders.
        images: for each row what its image is called, None for text alone.
        by_features: whether rows agree only if their visual tokens do bit for bit: where a method merges, and what it
            merges depends on the question, the same slots may hold other tokens.
    """
    tokens = torch.tensor(list(visual), device=input_ids.device)
    # Which visual tokens of each row stay: rows of one image agree in it or keep something else.
    is_visual = torch.isin(input_ids, tokens) & attention_mask.bool()
    stays, is_visual = pruned.keep.cpu(), is_visual.cpu()
    ids, mask = pruned.inputs["input_ids"].cpu(), pruned.inputs["attention_mask"].bool().cpu()
    left = torch.isin(ids, tokens.cpu()) & mask
    held = _features_by_row(pruned, len(ids)) if by_features else [b""] * len(ids)
    positions = pruned.inputs.get("position_ids")
    positions = None if positions is None else positions.cpu()
    prompts = []
    for row in range(len(ids)):
        own = ids[row, mask[row]].tolist()
        places = left[row, mask[row]].nonzero()
        end = int(places[-1]) + 1 if len(places) else 0
        kept = bytes(stays[row, is_visual[row]].tolist())
        where = b"" if positions is None else positions[..., row, mask[row]][..., :end].contiguous().numpy().tobytes()
        prompts.append(Prompt(own, end, (images[row] if kept else None, kept, where, held[row])))
    return prompts


def _features_by_row(pruned: Pruned, rows: int) -> list[bytes]:
    """Return the visual tokens of each row, bit for bit."""
    held = [b""] * rows
    for modality, output in (pruned.inputs.get("mm_encoder_outputs") or {}).items():
        for row, features in zip(pruned.rows[modality], features_by_image(output, pruned.kept[modality]), strict=True):
            held[row] += features.float().cpu().contiguous().numpy().tobytes()  # float32 holds every half exactly
    return held


def share(
    model: PreTrainedModel,
    family: Family,
    pruned: Pruned,
    prompts: Sequence[Prompt],
    groups: Sequence[Group],
    max_new_tokens: int,
) -> SharedPrompts | None:
    """Run the stock model over each group's prefix and return what it goes on from.

    Args:
        model: the stock model.
        family: its family.
        pruned: the batch.
        prompts: its rows.
        groups: which rows share what.
        max_new_tokens: longest answer.

    Returns:
        None if a sliding window is shorter than prompts and answers: it counts columns, and padding stands between a
        prefix and what follows.
    """
    cache = _cache(model)
    inputs = pruned.inputs
    device = inputs["input_ids"].device
    lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
    of_row = torch.zeros(len(prompts), dtype=torch.long)
    for number, group in enumerate(groups):
        of_row[list(group.rows)] = number
    prefix = torch.tensor([group.length for group in groups])  # (G,)
    rest = lengths - prefix[of_row]  # (B,)
    first, last = int(prefix.max()), int(rest.max())
    width = first + last
    windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    if windows and width + max_new_tokens > min(windows):
        return None

    begun = prefix_inputs(family, pruned, groups, lengths)
    begun["mm_encoder_outputs"] = _features_of(family, pruned, {group.rows[0] for group in groups})
    if not begun["mm_encoder_outputs"]:
        del begun["mm_encoder_outputs"]
    stock: Any = model  # what generation has comes from a mixin that the type of all models does not have
    if stock._supports_logits_to_keep():
        begun["logits_to_keep"] = 1  # nobody reads them; stock generation asks the same way
    stock(**begun, past_key_values=cache, use_cache=True)
    cache.batch_select_indices(of_row.to(device))

    columns = torch.arange(width)
    in_prefix = columns[None] < prefix[of_row][:, None]
    in_rest = columns[None] >= width - rest[:, None]
    result = {name: value for name, value in inputs.items() if name != "mm_encoder_outputs"}
    # What stands left of the bar is not read by the model but by processors of its logits, such as repetition_penalty,
    # which find the prompts as they would without a cache.
    result["input_ids"] = _right_aligned(inputs["input_ids"], width)
    result["attention_mask"] = (in_prefix | in_rest).to(inputs["attention_mask"]).to(device)
    if inputs.get("position_ids") is not None:
        result["position_ids"] = _right_aligned(inputs["position_ids"], width)
    for name, fill in family.aligned.items():
        if inputs.get(name) is not None:
            result[name] = inputs[name].new_full((len(prompts), width), fill)  # text alone is left
    result["past_key_values"] = cache
    return SharedPrompts(result, width, len(groups))


def prefix_inputs(
    family: Family,
    pruned: Pruned,
    groups: Sequence[Group],
    lengths: Int[Tensor, " B"],
) -> dict[str, Any]:
    """Return ids (G, P), mask and what else follows the sequence of each group's prefix, padded on the right.

    Args:
        family: of the model.
        pruned: the batch, padded on the left.
        groups: which rows share what.
        lengths: of the rows without padding.
    """
    inputs = pruned.inputs
    device, total = inputs["input_ids"].device, inputs["input_ids"].shape[1]
    rows = torch.tensor([group.rows[0] for group in groups])
    prefix = torch.tensor([group.length for group in groups])
    columns = torch.arange(int(prefix.max()))[None]
    there = (columns < prefix[:, None]).to(device)  # (G, P)
    places = (total - lengths[rows][:, None] + columns).clamp(max=total - 1).to(device)
    rows = rows.to(device)

    def gather(values: Shaped[Tensor, "B L"], fill: int) -> Shaped[Tensor, "G P"]:
        return values[rows].gather(1, places).masked_fill(~there, fill)

    begun = {"input_ids": gather(inputs["input_ids"], 0), "attention_mask": there.to(inputs["attention_mask"])}
    for name, fill in family.aligned.items():
        if inputs.get(name) is not None:
            begun[name] = gather(inputs[name], fill)
    positions = inputs.get("position_ids")
    if positions is not None and positions.ndim == 3:
        begun["position_ids"] = torch.stack([gather(part, 0) for part in positions])
    elif positions is not None:
        begun["position_ids"] = gather(positions, 0)
    return begun


def is_left_padded(mask: Shaped[Tensor, "B L"]) -> bool:
    """Return whether no row has padding but before its first token, and every row has a token."""
    shown: Bool[Tensor, "B L"] = mask.bool()
    return bool(shown[:, -1].all() & (shown[:, 1:] >= shown[:, :-1]).all())


def _cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache, as stock generation makes it."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _right_aligned(values: Shaped[Tensor, "*parts B L"], width: int) -> Shaped[Tensor, "*parts B W"]:
    """Return the last columns of a batch, before them its first one again where there are not as many."""
    total = values.shape[-1]
    if total >= width:
        return values[..., total - width :]
    # Its first column: padding where a row has some, else a token that the row has anyway.
    before = values[..., :1].expand(*values.shape[:-1], width - total)
    return torch.cat([before, values], dim=-1)


def features_by_image(output: PrunedOutput, counts: Sequence[int]) -> list[Tensor]:
    """Return the features (K, D) of each image, however the model takes them."""
    features = output.pooler_output
    if isinstance(features, Tensor):
        return list(features.reshape(-1, features.shape[-1]).split(list(counts)))
    return list(features)


def _features_of(family: Family, pruned: Pruned, rows: set[int]) -> dict[str, PrunedOutput]:
    """Return the visual tokens of some rows as the model takes them."""
    found = {}
    for modality, output in (pruned.inputs.get("mm_encoder_outputs") or {}).items():
        counts = pruned.kept[modality]
        images = [image for image, row in enumerate(pruned.rows[modality]) if row in rows]
        if not any(counts[image] for image in images):
            continue
        features = features_by_image(output, counts)
        levels = [[level[image] for image in images] for level in output.deepstack_features or ()]
        own = family.put_back([features[image] for image in images], levels, modality)
        if isinstance(own.pooler_output, Tensor):
            own.pooler_output = in_blocks(own.pooler_output, [counts[image] for image in images])
        found[modality] = own
    return found
