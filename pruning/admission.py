"""Models that no family covers: what of them is checked before the first batch is pruned."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from prunetune.pruning.errors import PruningError
from prunetune.pruning.families.base import Family
from prunetune.pruning.hooks import frozen_parts_at_rest, is_partitioned, record_output
from prunetune.pruning.registry import registered_methods
from prunetune.pruning.rewrite import Chosen, rewrite
from prunetune.pruning.select import candidates
from prunetune.pruning.sequence import counted, placeholders, shorten
from prunetune.pruning.signals import of_source, signal_of
from prunetune.pruning.types import Pruner, keep_all
from prunetune.reading import one_line
from prunetune.screen import say

# Of each model the position policy, and the modalities that a batch had: images say nothing of videos.
_ADMITTED: WeakKeyDictionary[nn.Module, set[tuple[str, frozenset[str]]]] = WeakKeyDictionary()
_SAID: set[str] = set()  # model types: arms of one base are models of their own


def check_reads_no_tower(pruner: Pruner, name: str, merges: bool, family: str) -> None:
    """Check a method for a family whose features have left the projector already.

    Raises:
        PruningError: if it merges tokens before the projector, or reads the tower, with the methods that work.
    """
    if not merges and not _reads_tower(pruner):
        return
    works = []
    for method in registered_methods().values():
        if not method.merges and not method.video and not _reads_tower(method.pruner()):
            works.append(method.name)
    what = "merges tokens before the projector" if merges else f"reads {', '.join(sorted(_reads_tower(pruner)))}"
    raise PruningError(
        f"{name} {what}, and family {family!r} sees images behind it only; choose {', '.join(works)}, or write a "
        "family for this model: docs/adding.md"
    )


def _reads_tower(pruner: Pruner) -> set[str]:
    """Return the signals of a method that come from the tower, its pixels, or its features in CLIP's space."""
    read = {signal_of(need).name for need in of_source(pruner.needs, "attention", "reader", "output", "pixels")}
    for need in of_source(pruner.needs, "text"):
        if signal_of(need).space == "clip":
            read.add(signal_of(need).name)
    return read


@torch.no_grad()
def admit(model: nn.Module, family: Family, inputs: Mapping[str, Any], position_policy: str) -> None:
    """Run a batch with images unpruned, as it is and through the plug, and compare bit by bit.

    It is done once for every model, position policy and set of modalities that a batch can have. Positions are compared
    too: of a batch that loses nothing the plug writes none, of a pruned one it does.

    What is compared are the hidden states that enter the head, of every position: the logits are a function of them,
    and they are many times larger.

    Args:
        model: the stock model.
        family: one that is not proven for it.
        inputs: what the processor returned, checked.
        position_policy: "compact" or "original".

    Raises:
        PruningError: if the two differ, also by the positions that a pruned batch gets, if the model can't take the
            batch or what was encoded, or if it is partitioned (ZeRO-3).
    """
    there = frozenset(modality for modality, name in family.pixels.items() if inputs.get(name) is not None)
    admitted = _ADMITTED.setdefault(model, set())
    if (position_policy, there) in admitted or not there:
        return
    config: Any = model.config
    kind: str = config.model_type
    if is_partitioned(model.parameters()):
        raise PruningError(
            f"no family covers model_type {kind!r}, and the comparison that the generic one begins with leaves ranks "
            "out of step under ZeRO-3; train with train.deepspeed: zero2, or write a family: docs/adding.md"
        )
    with frozen_parts_at_rest(model):
        stock = {name: value for name, value in inputs.items() if name not in ("labels", *family.left_out())}
        as_given = "give the batch as its processor returns it"
        # First, since it says of placeholders and images that disagree where they do.
        with _told(f"no family covers model_type {kind!r}, and its images can't be encoded", as_given):
            ours = _unpruned(model, family, stock, position_policy)
        with _told(f"the stock model of model_type {kind!r} can't run this batch", as_given):
            expected = _hidden_states(model, stock)
        # A model that reads more of its encoder's output than its features says so in its own words.
        what = f"no family covers model_type {kind!r}, and it can't be run on what the generic one encoded"
        with _told(what, "write a family for it: docs/adding.md"):
            found = _hidden_states(model, ours)
        if not torch.equal(found, expected):
            raise _changed(kind, "unpruned", found, expected)
        if inputs.get("position_ids") is None and not family.counts_rows_and_columns:  # which get theirs always
            _check_positions(model, family, stock, expected, position_policy)
    admitted.add((position_policy, there))
    if kind not in _SAID and os.environ.get("RANK", "0") == "0":
        say(
            f"no family covers model_type {kind!r}: the generic one was compared with the stock model on this batch, "
            "and unpruned both are the same bit for bit"
        )
    _SAID.add(kind)


def _changed(kind: str, how: str, found: Tensor, expected: Tensor) -> PruningError:
    apart = (found.float() - expected.float()).abs().max() if found.shape == expected.shape else float("nan")
    return PruningError(
        f"no family covers model_type {kind!r}, and the generic one changes it: {how}, its hidden states differ "
        f"from the stock model's by up to {float(apart):.3g} on this batch; write a family for it: docs/adding.md"
    )


def _check_positions(
    model: nn.Module, family: Family, inputs: Mapping[str, Any], expected: Tensor, position_policy: str
) -> None:
    """Compare a batch without positions, which the model then counts itself, with the positions that pruning writes.

    Args:
        model: the stock model.
        family: its family, with plain positions.
        inputs: the batch, without positions.
        expected: (B, L, D) of the stock run on it.
        position_policy: "compact" or "original".

    Raises:
        PruningError: if they differ.
    """
    mask = inputs["attention_mask"].bool()  # (B, L)
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        # A model by itself counts padding on the left, in inference too. That shifts all of a row and shows in
        # rounding alone, so such a batch is compared with its padding on the right.
        inputs = shorten(inputs, mask, None, "right", family.aligned)
        del inputs["position_ids"]
        mask = inputs["attention_mask"].bool()
        expected = _hidden_states(model, inputs)
    ours = _unpruned(model, family, inputs, position_policy)
    positions = family.positions(model, inputs) if position_policy == "original" else None
    if positions is None:
        positions = counted(mask) + family.first_position
    found = _hidden_states(model, {**ours, "position_ids": positions})
    if not torch.equal(found[mask], expected[mask]):
        how = f"with the positions of a pruned batch ({position_policy}, from {family.first_position})"
        raise _changed(str(model.config.model_type), how, found[mask], expected[mask])  # type: ignore[union-attr]


@contextmanager
def _told(what: str, todo: str) -> Iterator[None]:
    """Say whatever a model raises in one line."""
    try:
        yield
    except (PruningError, torch.OutOfMemoryError):
        raise
    # Anything: models say in their own words what they can't take.
    except Exception as error:
        raise PruningError(f"{what}: {one_line(error)}; {todo}") from error


def _unpruned(model: nn.Module, family: Family, inputs: Mapping[str, Any], position_policy: str) -> dict[str, Any]:
    """Return a batch as the plug writes it when everything is kept."""
    chosen, placeholders_at = {}, {}
    for modality, name in family.pixels.items():
        if inputs.get(name) is None:
            continue
        vision = family.encode(model, inputs, modality, frozenset())
        token = family.token_id(model, modality)
        placeholders_at[modality], _ = placeholders(inputs["input_ids"], token, vision.lengths, modality)
        among = candidates(vision, "item")
        chosen[modality] = Chosen(vision, among, [keep_all(own.tokens) for own in among])
    options: dict[str, Any] = {"newline": "all", "padding_side": "right", "merges": False}
    return rewrite(model, family, inputs, chosen, placeholders_at, position_policy=position_policy, **options).inputs


def _hidden_states(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return what enters the head, (B, L, D), of a run without a cache."""
    body: Any = model.base_model
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    _forget(body)
    with record_output(body) as outputs:
        # Its own forward and not a call: an attached pruner would prune this run.
        model.forward(**inputs, **options)
    _forget(body)
    output: Any = outputs[0]
    return output.last_hidden_state


def _forget(body: Any) -> None:
    """Clear the positions that M-RoPE models remember of their last batch."""
    if hasattr(body, "rope_deltas"):
        body.rope_deltas = None
