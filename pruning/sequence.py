"""Shortening a batch of sequences: drop positions, close the gaps, pad again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pruning.types import PruningError

IGNORE_INDEX = -100
POSITION_POLICIES = ("compact", "original")


def placeholder_runs(input_ids: Tensor, token_id: int, lengths: list[int]) -> list[tuple[int, Tensor]]:
    """Return for every image its row and its placeholder positions (N,), images in reading order.

    Raises:
        PruningError: if placeholders and images disagree, naming the first row whose placeholders do not add up.
    """
    where = (input_ids == token_id).nonzero()
    if len(where) != sum(lengths):
        raise PruningError(
            f"the batch has {len(where)} image placeholder tokens but its {len(lengths)} images have "
            f"{sum(lengths)} visual tokens; each image needs exactly one run of placeholders. "
            f"{_where_they_disagree(input_ids, token_id, lengths)}"
        )
    ends = torch.tensor(lengths).cumsum(0)
    rows = where[:, 0].tolist()
    runs = []
    for image, (end, piece) in enumerate(zip(ends.tolist(), where[:, 1].split(lengths), strict=True)):
        row, last = rows[end - len(piece)], rows[end - 1]
        if last != row:
            raise PruningError(
                f"image {image} would span rows {row} and {last} of the batch: "
                f"a sample's placeholders and images disagree. "
                f"{_where_they_disagree(input_ids, token_id, lengths)}"
            )
        runs.append((row, piece))
    return runs


def _where_they_disagree(input_ids: Tensor, token_id: int, lengths: list[int]) -> str:
    counts = (input_ids == token_id).sum(dim=1).tolist()
    return f"Placeholders per row: {counts}; visual tokens per image: {lengths}"


def shorten(inputs: Mapping[str, Any], kept: Tensor, position_policy: str, padding_side: str) -> dict[str, Any]:
    """Drop every position that ``kept`` (B, L) denies, and pad the rows to one length again.

    ``input_ids``, ``attention_mask``, ``labels`` and ``position_ids``, all (B, L), are shortened; everything else
    passes. With nothing to drop the inputs come back as they are.

    Args:
        inputs: model inputs with ``input_ids`` and ``attention_mask``.
        kept: boolean; padding may be kept or denied, it is dropped either way.
        position_policy: "compact" numbers the kept tokens 0, 1, 2, ...; "original" keeps the full sequence's numbers.
        padding_side: "right" for training, "left" for generation.
    """
    if position_policy not in POSITION_POLICIES:
        raise PruningError(f"position_policy is one of {', '.join(POSITION_POLICIES)}, got {position_policy!r}")
    if padding_side not in ("left", "right"):
        raise PruningError(f"padding_side is 'left' or 'right', got {padding_side!r}")
    result = dict(inputs)
    if bool(kept.all()):
        return result
    mask = inputs["attention_mask"].bool()
    positions = inputs.get("position_ids")
    if positions is None:
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    stays = kept & mask
    lengths = stays.sum(dim=1)
    length = int(lengths.max())
    # Stable sorting moves the kept positions to one side without changing their order.
    order = torch.sort(stays.long(), dim=1, descending=padding_side == "right", stable=True).indices
    order = order[:, :length] if padding_side == "right" else order[:, order.shape[1] - length :]
    new_mask = stays.gather(1, order)

    def gather(values: Tensor, fill: int) -> Tensor:
        return values.gather(1, order).masked_fill(~new_mask, fill)

    result["input_ids"] = gather(inputs["input_ids"], 0)
    result["attention_mask"] = new_mask.to(inputs["attention_mask"].dtype)
    if inputs.get("labels") is not None:
        result["labels"] = gather(inputs["labels"], IGNORE_INDEX)
    if position_policy == "original":
        result["position_ids"] = gather(positions, 0)
    else:
        result["position_ids"] = (new_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return result


def pack(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Put all rows of a right-padded batch behind one another in a single row, without padding.

    Every sample's positions begin at 0 and there is no mask: transformers then keeps samples from seeing each other,
    with a block mask or the kernel's variable lengths. The loss is that of the batch, a mean over the same tokens.

    Args:
        inputs: model inputs with ``input_ids``, ``attention_mask`` and ``labels``, all (B, L), as :func:`shorten`
            leaves them with compact positions; everything else passes.
    """
    result = dict(inputs)
    mask = result.pop("attention_mask").bool()
    result["position_ids"] = (mask.long().cumsum(dim=1) - 1)[mask][None]
    labels = result["labels"].clone()
    labels[:, 0] = IGNORE_INDEX  # the token before it belongs to another sample
    result["labels"], result["input_ids"] = labels[mask][None], result["input_ids"][mask][None]
    result["use_cache"] = False  # with a cache the positions would not be read as several samples
    return result
