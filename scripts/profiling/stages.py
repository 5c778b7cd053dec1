"""One inference taken apart: what each stage takes, by a clock or by any other counter that only rises."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunetune.pruning import PrunedModel
from prunetune.pruning.families import Family
from prunetune.pruning.rewrite import Pruned
from prunetune.pruning.stages.plan import Plan

Now = Callable[[], float]
"""Reads a counter: seconds, or FLOP."""
STAGES = ("tower", "projector", "signals", "selection", "rewriting", "inside", "prefill")
"""Of a request before its first token, in their order; all but the first two and the last are the pruner's own."""
PRUNERS_OWN = ("signals", "selection", "rewriting", "inside")


def clock(device: torch.device) -> Now:
    """Return what reads the time in seconds, after everything that was sent to the device is done."""
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


@contextmanager
def flop_counter() -> Iterator[Now]:
    """Yield what reads the FLOP that torch has counted while the context is open: matrix products and convolutions."""
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_attentions(), _attention_flop)) as counter:
        yield lambda: float(counter.get_total_flops())


def _attentions() -> list[Any]:
    """Return torch's own attention kernels; it counts those for GPUs alone, and refuses grouped keys."""
    kinds = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    names = [f"_scaled_dot_product_{kind}" for kind in kinds]
    return [getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name)]


def _attention_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Return the FLOP of scores and their weighted sum, from shapes (B, H, N, C); all pairs, for each query head."""
    batch, heads, queries, width = query
    return int(2 * batch * heads * queries * key[2] * (width + value[3]))


@dataclass(frozen=True)
class Staged:
    """A request's way to its first token.

    Attributes:
        spent: by stage.
        prepared: what the LLM was given.
        cache: the keys and values of the prompt.
        plan: what stages inside the LLM decided; None without any.
    """

    spent: dict[str, float]
    prepared: Pruned
    cache: Any
    plan: Plan | None = None


class _Ledger:
    """Books what a counter rises by on the stage that runs; a stage within another one is not booked on both."""

    def __init__(self, now: Now) -> None:
        self.now = now
        self.spent = dict.fromkeys(STAGES, 0.0)
        self.open: list[str] = []
        self.last = 0.0

    def enter(self, stage: str) -> None:
        """Begin a stage; the one around it waits."""
        at = self.now()
        if self.open:
            self.spent[self.open[-1]] += at - self.last
        self.open.append(stage)
        self.last = at

    def leave(self) -> None:
        """End the stage that was begun last."""
        at = self.now()
        self.spent[self.open.pop()] += at - self.last
        self.last = at

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Book what the block takes."""
        self.enter(name)
        yield
        self.leave()


def staged(pruned: PrunedModel, inputs: Mapping[str, Any], now: Now) -> Staged:
    """Run a batch up to its first token, and read a counter between stages.

    ``tower`` and ``projector`` are those modules' own; ``signals`` is what the encoding takes beside them, and reading
    the text; ``selection`` the method; ``rewriting`` the rest of the preparation; ``inside`` what stages hear, choose
    and cut between layers; ``prefill`` the LLM and its head.
    What each takes adds up to the whole. On a GPU every reading waits for the device, so the whole is a little slower
    than one that runs through.

    Args:
        pruned: the model with its pruner; it stays as it is.
        inputs: a batch on the model's device.
        now: the counter.
    """
    ledger = _Ledger(now)
    with _watched_modules(pruned, ledger):
        with ledger.stage("rewriting"):
            prepared = _watched(pruned, ledger).prepare(inputs, padding_side="left")
        with ledger.stage("prefill"), _watched_inside(pruned, ledger) as plans:
            output = pruned.run(prepared, {**prepared.inputs, **_of_the_last_position(pruned.model)})
    return Staged(ledger.spent, prepared, output.past_key_values, plans[0] if plans else None)


def _of_the_last_position(model: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    return options


class _Watched:
    """Something that is called, and whose calls are booked; everything else of it is its own."""

    def __init__(self, inner: Any, stage: str, ledger: _Ledger) -> None:
        self._inner, self._stage, self._ledger = inner, stage, ledger

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._ledger.stage(self._stage):
            return self._inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _watched(pruned: PrunedModel, ledger: _Ledger) -> PrunedModel:
    """Return a copy that shares everything with a pruned model, and books what its parts take."""
    copied, text = copy.copy(pruned), copy.copy(pruned.text)
    vars(text).update(add=_Watched(pruned.text.add, "signals", ledger))
    encode, pruner = _Watched(pruned.encode, "signals", ledger), _Watched(pruned.pruner, "selection", ledger)
    vars(copied).update(text=text, encode=encode, pruner=pruner)
    return copied


@contextmanager
def _watched_inside(pruned: PrunedModel, ledger: _Ledger) -> Iterator[list[Plan]]:
    """Book what stages compute between layers, and yield what they decide."""
    stages = pruned.stages
    if stages is None:
        yield []
        return
    before, stages.around = stages.around, lambda: ledger.stage("inside")
    try:
        with stages.noted() as plans:
            yield plans
    finally:
        stages.around = before


@contextmanager
def _watched_modules(pruned: PrunedModel, ledger: _Ledger) -> Iterator[None]:
    """Book what tower and projector take; a projector within the tower is not booked as tower."""
    parts = [("tower", part) for part in pruned.family.frozen_parts(pruned.model)]
    parts += [("projector", part) for part in projectors_of(pruned.family, pruned.model)]
    handles = []
    try:
        for stage, part in parts:
            handles.append(part.register_forward_pre_hook(lambda *_, stage=stage: ledger.enter(stage)))
            handles.append(part.register_forward_hook(lambda *_: ledger.leave()))
        yield
    finally:
        for handle in handles:
            handle.remove()


def projectors_of(family: Family, model: Any) -> list[nn.Module]:
    """Return the modules of the projector that are called; a list of modules never is, but those in it."""
    found: list[nn.Module] = []
    for path in family.projectors:
        module = model.base_model.get_submodule(path)
        found += list(module) if isinstance(module, nn.ModuleList) else [module]
    return found


class _Stamps:
    """A streamer, as stock generation calls it, that notes when each token is there."""

    def __init__(self, now: Now) -> None:
        self.now = now
        self.at: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self.at.append(self.now())

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class Generated:
    """An answer of a fixed length.

    Attributes:
        first: up to the first token.
        rest: from the first to the last.
        whole: both, and what is left to do then.
        tokens: (B, T) of the answers.
    """

    first: float
    rest: float
    whole: float
    tokens: Tensor


def generated(pruned: PrunedModel, inputs: Mapping[str, Any], new_tokens: int, now: Now) -> Generated:
    """Answer a batch with so many tokens, without a look between the stages."""
    return _clocked(lambda **options: pruned.generate(**inputs, **options).tokens, new_tokens, now)


def generated_by_stock(pruned: PrunedModel, inputs: Mapping[str, Any], new_tokens: int, now: Now) -> Generated:
    """Answer a batch with the stock model, which sees nothing of this package."""
    model: Any = pruned.model
    left_out = {"instructions", "sample_ids", "video_seconds", *pruned.family.left_out()}
    own = {name: value for name, value in inputs.items() if name not in left_out}
    length = own["input_ids"].shape[1]
    return _clocked(lambda **options: model.generate(**own, **options)[:, length:], new_tokens, now)


def _clocked(run: Callable[..., Tensor], new_tokens: int, now: Now) -> Generated:
    stamps = _Stamps(now)
    began = now()
    tokens = run(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, streamer=stamps)
    done = now()
    _, first, *rest = stamps.at  # the prompt is handed to a streamer as well
    return Generated(first - began, (rest[-1] if rest else first) - first, done - began, tokens)


def layers_of(pruned: PrunedModel, prepared: Pruned, plan: Plan | None = None) -> list[int]:
    """Return how many tokens of a prompt each layer of the LLM processes, padding included.

    Pruned before the LLM, every layer sees as many. Stages that drop tokens between layers enter here and nowhere
    else: FLOP and cache follow from this list, and the cache is compared with the one that was measured.

    Args:
        pruned: the model with its pruner.
        prepared: what the LLM was given.
        plan: what stages decided; None without any.
    """
    if plan is not None:
        return plan.widths()
    width = int(prepared.inputs["input_ids"].shape[1])
    layers: Any = pruned.model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    return [width] * int(layers)


def measured_cache(cache: Any) -> float | None:
    """Return the bytes of all keys and values in a cache; None of a kind that holds something else as well."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    total = 0
    for layer in layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
            return None
        total += keys.numel() * keys.element_size() + values.numel() * values.element_size()
    return float(total)
