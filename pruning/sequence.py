"""Rewriting a batch of sequences: find placeholders, drop positions, close the gaps, pad again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from prunetune.pruning.errors import PruningError

IGNORE_INDEX = -100  # the label that transformers' losses leave out


def placeholders(
    input_ids: Int[Tensor, "B L"],
    token_id: int,
    lengths: list[int],
    what: str = "image",
) -> tuple[Int[Tensor, "S 2"], list[int]]:
    """Return row and column (S, 2) of all placeholders in reading order, and the row of every image.

    With placeholder 9 and lengths [2, 1], the rows ``[1 9 9 2]`` and ``[1 9 3 0]`` give ``[[0, 1], [0, 2], [1, 1]]``
    and ``[0, 1]``. The placeholders of an image need not follow one another.

    Args:
        input_ids: (B, L).
        token_id: the placeholder.
        lengths: how many placeholders each image has, images in reading order.
        what: what to call an image in a message.

    Raises:
        PruningError: if placeholders and images disagree.
    """
    found = (input_ids == token_id).nonzero()  # (S, 2), row by row: the order in which images are read
    if len(found) != sum(lengths):
        raise PruningError(
            f"the batch has {len(found)} {what} placeholder tokens but its {len(lengths)} {what}s have "
            f"{sum(lengths)} visual tokens; each {what} needs exactly one run of placeholders. "
            f"{_where_they_disagree(input_ids, token_id, lengths, what)}"
        )
    row_of = found[:, 0].tolist()
    rows = []
    first = 0
    for image, length in enumerate(lengths):
        row, last_row = row_of[first], row_of[first + length - 1]
        # Equal totals are not enough: one sample with a placeholder too many and one with too few would pass.
        if last_row != row:
            raise PruningError(
                f"{what} {image} would span rows {row} and {last_row} of the batch: "
                f"a sample's placeholders and {what}s disagree. "
                f"{_where_they_disagree(input_ids, token_id, lengths, what)}"
            )
        rows.append(row)
        first += length
    return found, rows


def _where_they_disagree(
    input_ids: Int[Tensor, "B L"],
    token_id: int,
    lengths: list[int],
    what: str,
) -> str:
    counts = (input_ids == token_id).sum(dim=1).tolist()
    return f"Placeholders per row: {counts}; visual tokens per {what}: {lengths}"


def shorten(
    inputs: Mapping[str, Any],
    keep: Bool[Tensor, "B L"],
    positions: Int[Tensor, "*parts B L"] | None,
    padding_side: str,
    aligned: Mapping[str, int] | None = None,
    first: int = 0,
) -> dict[str, Any]:
    """Drop every position that ``keep`` (B, L) denies, and pad the rows to one length again.

    ``input_ids``, ``attention_mask``, ``labels`` and what ``aligned`` names, all (B, L), are cut, ``position_ids`` are
    set; everything else passes. With ``keep`` ``[[1, 0, 1], [1, 1, 1]]``, ids ``[[5, 9, 6], [5, 9, 7]]``, compact
    positions and padding on the right, the ids become ``[[5, 6, 0], [5, 9, 7]]``, the positions
    ``[[0, 1, 1], [0, 1, 2]]``. With nothing to drop the inputs come back as they are, with positions only where these
    have three parts: a model computes those from pixels, which pruning takes away.

    Args:
        inputs: model inputs with ``input_ids`` and ``attention_mask``.
        keep: boolean; padding may be kept or denied, it is dropped either way.
        positions: those of the full sequence, (B, L) or (3, B, L), of which the kept ones stay; None numbers the kept
            tokens 0, 1, 2, ... With three parts the result is (4, B, L'): the first row counts tokens, for the mask.
        padding_side: "right" for training, "left" for generation.
        aligned: other inputs to cut, and the value that padding gets.
        first: the position of a row's first token where kept tokens are numbered anew.
    """
    if padding_side not in ("left", "right"):
        raise PruningError(f"padding_side is 'left' or 'right', got {padding_side!r}")
    result = dict(inputs)
    mask = inputs["attention_mask"].bool()  # (B, L)
    # Left as they are, so that a batch of which nothing is dropped is bit-identical to the stock model's.
    if bool(keep.all()):
        if positions is not None and positions.ndim == 3:
            result["position_ids"] = torch.cat([counted(mask)[None], positions])
        return result
    stays = keep & mask  # (B, L), without padding
    order = _staying_order(stays, padding_side)  # (B, L')
    new_mask = stays.gather(1, order)  # (B, L')

    def gather(
        values: Shaped[Tensor, "B L"],
        fill: int,
    ) -> Shaped[Tensor, "B L2"]:
        return values.gather(1, order).masked_fill(~new_mask, fill)

    fills = {"input_ids": 0, "labels": IGNORE_INDEX, **(aligned or {})}
    for name, fill in fills.items():
        if inputs.get(name) is not None:
            result[name] = gather(inputs[name], fill)
    result["attention_mask"] = new_mask.to(inputs["attention_mask"].dtype)
    if positions is None:
        result["position_ids"] = counted(new_mask) + first
    elif positions.ndim == 3:
        parts = [counted(new_mask)]
        for part in positions:
            parts.append(gather(part, 0))
        result["position_ids"] = torch.stack(parts)
    else:
        result["position_ids"] = gather(positions, 0)
    return result


def _staying_order(
    stays: Bool[Tensor, "B L"],
    padding_side: str,
) -> Int[Tensor, "B L2"]:
    """Return the columns of the staying tokens in their order, rows filled up with others on the padding side.

    Of ``[[True, False, True], [False, False, True]]`` padded on the right it is ``[[0, 2], [2, 0]]``.
    """
    length = int(stays.sum(dim=1).max())
    right = padding_side == "right"
    # Stable sorting moves the staying columns to one side without changing their order.
    order = torch.sort(stays.long(), dim=1, descending=right, stable=True).indices
    if right:
        return order[:, :length]
    return order[:, order.shape[1] - length :]


def counted(mask: Bool[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Return the positions of what a mask (B, L) shows: ``[[False, True, True]]`` gives ``[[0, 0, 1]]``."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
