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


class DefinedDifferently(Exception):
    """A case whose answer a named option gives, and which our default defines otherwise for the reason given."""


class Device:
    """Where the cases are run.

    Attributes:
        current: set from the command line.
    """

    current = torch.device("cpu")


def tensor(case: Case, key: str) -> Tensor:
    """Return a stored array on the device that is checked."""
    return torch.from_numpy(np.asarray(case[key])).to(Device.current)


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
    rows = selection.indices if selection.origin is None else selection.origin
    found = []
    for row in rows:
        real = row[row >= 0]  # -1 is an output made around no token, such as an aggregate
        found.append(real.sort().values)
    return found


def defined_differently(name: str, case: Case) -> str | None:
    """Return why a case is not ours to match: a named quirk by which the published answer is no K distinct tokens.

    The quirk's own condition must hold in the inputs; any other odd answer is compared, and differs.
    """
    rows = _stored_rows(case)
    if name == "prumerge_plus":
        return _kept_twice(case, rows)
    if name in ("divprune", "cdpruner"):
        return _ran_out(name, case, rows)
    if name in ("prumerge", "trim") and any(len(row) == 0 for row in rows):
        return "without outliers the published code keeps no token of its own; ours keeps the strongest"
    return None


def _stored_rows(case: Case) -> list[list[int]]:
    """Return every list of positions that a case stores, an item each."""
    rows = []
    for key in case:
        if key.startswith(("kept_indices", "selection_order")):
            rows += np.atleast_2d(np.asarray(case[key])).tolist()
    return rows


def _repeats(row: list[int]) -> set[int]:
    """Return what stands more than once in a row."""
    return {position for position in row if row.count(position) > 1}


def _kept_twice(case: Case, rows: list[list[int]]) -> str | None:
    """PruMerge+ at a fixed ratio: a sampled token that is an outlier as well is kept twice."""
    if bool(case["adaptive"]) or not any(_repeats(row) for row in rows):
        return None
    count, ratio = np.asarray(case["vision_hidden"]).shape[1], float(case["fixed_ratio"])
    outliers, step = int(count * ratio), int(1 / ratio)
    samples = set(range(step // 2, count - 1, step))
    twice = 0
    for row in np.atleast_2d(np.asarray(case["selection_order"])).tolist():
        # Outliers come first in the published order; what repeats must be a sample among them, or it is no quirk.
        if _repeats(row) != samples & set(row[:outliers]):
            return None
        twice += len(_repeats(row))
    return (
        f"the published fixed ratio keeps {twice} tokens twice, as outlier and as sample, and loses others; ours keeps "
        "distinct tokens"
    )


def _ran_out(name: str, case: Case, rows: list[list[int]]) -> str | None:
    """Duplicate or zero tokens: the published loops find fewer than K different ones."""
    keep = int(case.get("keep", 0))
    short = any(len(set(row)) < keep for row in rows)
    if not short and not any(_repeats(row) for row in rows):
        return None
    for tokens in np.asarray(case["projected"]):
        # DivPrune needs different tokens, CDPruner's determinant independent ones.
        different = len(np.unique(tokens, axis=0)) if name == "divprune" else np.linalg.matrix_rank(tokens)
        if different < keep or not tokens.any(axis=-1).all():
            return "the published code runs out of different tokens and keeps fewer than K; ours keeps K distinct"
    return None
