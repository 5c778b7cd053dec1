"""Comparing a stored case with our answer, and telling named quirks of published code by their conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunetune.pruning import Selection

Case = Mapping[str, Any]
ATOL = 2e-4


class Differs(Exception):
    """A case whose answer is not ours."""


def agree(case: Case, key: str, ours: Any) -> None:
    """Compare one stored array, exactly if it holds integers.

    Raises:
        Differs: naming the array and how much of it differs.
    """
    theirs = np.asarray(case[key])
    value = ours.detach().cpu().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
    if value.shape != theirs.shape:
        raise Differs(f"{key} has shape {value.shape}, published {theirs.shape}")
    if np.issubdtype(theirs.dtype, np.floating):
        gap = float(np.abs(value - theirs).max(initial=0.0))
        if not gap <= ATOL:
            raise Differs(f"{key} is off by up to {gap:.2g}")
    elif not np.array_equal(value, theirs):
        raise Differs(f"{key}: {int((value != theirs).sum())} of {theirs.size} entries differ")


def agree_per_item(case: Case, key: str, ours: list[Tensor]) -> None:
    """Compare an array stored for all items at once, or one per item where their lengths differ."""
    if key in case:
        if len({value.shape for value in ours}) > 1:
            raise Differs(f"{key}: items keep {[len(value) for value in ours]} tokens, published all the same number")
        agree(case, key, torch.stack(ours))
    else:
        for item, value in enumerate(ours):
            agree(case, f"{key}_{item}", value)


def kept(selection: Selection) -> list[Tensor]:
    """Return each item's kept tokens, ascending; of merging methods those that an output was made around."""
    rows = selection.origin if selection.origin is not None else selection.indices
    return [row[row >= 0].sort().values for row in rows]


def defined_differently(name: str, case: Case) -> str | None:
    """Return why a case is not ours to match: a named quirk by which the published answer is no K distinct tokens.

    The quirk's own condition must hold in the inputs; any other odd answer is compared, and differs.
    """
    stored = [np.asarray(case[key]) for key in case if key.startswith(("kept_indices", "selection_order"))]
    rows = [row for array in stored for row in np.atleast_2d(array)]
    repeats = any(len(set(row.tolist())) < len(row) for row in rows)
    short = "keep" in case and int(case["keep"]) > 0 and any(len(set(row.tolist())) < int(case["keep"]) for row in rows)
    if name == "prumerge_plus" and not bool(case["adaptive"]) and repeats:
        count, ratio = np.asarray(case["vision_hidden"]).shape[1], float(case["fixed_ratio"])
        number, step = int(count * ratio), int(1 / ratio)
        samples = set(range(step // 2, count - 1, step))
        order = np.atleast_2d(np.asarray(case["selection_order"]))
        twice = [{n for n in row.tolist() if row.tolist().count(n) > 1} for row in order]
        if all(found == samples & set(row[:number].tolist()) for found, row in zip(twice, order, strict=True)):
            return (
                f"the published fixed ratio keeps {sum(map(len, twice))} tokens twice, as outlier and as sample, and "
                "loses others; ours keeps distinct tokens"
            )
    if name in ("divprune", "cdpruner") and (repeats or short):
        items, keep = np.asarray(case["projected"]), int(case["keep"])
        spread = [len(np.unique(x, axis=0)) if name == "divprune" else np.linalg.matrix_rank(x) for x in items]
        if min(spread) < keep or not items.any(axis=-1).all():
            return "the published code runs out of different tokens and keeps fewer than K; ours keeps K distinct"
    if name in ("prumerge", "trim") and any(row.size == 0 for row in rows):
        return "without outliers the published code keeps no token of its own; ours keeps the strongest"
    return None
