"""Running stages by hooks on stock modules: nothing of the model is changed, and all is undone when the context closes.

Three kinds of hooks. The outer model's reads ids, mask and labels and hands a fresh plan on as a keyword argument,
which stock code passes to every layer. Each layer's takes it out again, cuts the states at its boundary, and cuts masks
and positions above it. The language model's takes the plan from the cache in later steps, and puts states back to the
full length, so that stock losses and heads need to know nothing. Gradient checkpointing wraps what layers compute, and
their hooks stay outside: they run once, and what is computed again is of the shorter sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.pruning.errors import PruningError
from prunetune.pruning.hooks import is_partitioned
from prunetune.pruning.ops.precision import exact_float32
from prunetune.pruning.stages.base import Heard
from prunetune.pruning.stages.decoder import (
    Decoder,
    Rotary,
    as_mask,
    at_slots,
    attention_of,
    causal_mask,
    check_cache,
    counted_from,
    cut_mask,
    keys_of,
    scattered,
    unit_scores_of,
)
from prunetune.pruning.stages.plan import PLAN, Plan, Segment, decode_seen, plan_of
from prunetune.pruning.stages.schedule import Point, Schedule

_ONE_AT_A_TIME = {
    "assistant_model": "a draft model's candidates stand behind the prompt in the first call",
    "prompt_lookup_num_tokens": "looked-up candidates stand behind the prompt in the first call",
    "assistant_early_exit": "candidates of an early layer stand behind the prompt in the first call",
    "use_mtp": "candidates of its own further heads stand behind the prompt in the first call",
    "prefill_chunk_size": "the last prompt token is not in the first chunk",
    "guidance_scale": "the prompt without its condition runs beside it, through the same stages and without a plan",
}
_OFF = {"use_mtp": False, "guidance_scale": 1}
"""Values that leave an option as it is by default."""


@dataclass(frozen=True)
class Call:
    """One call of the language model.

    Attributes:
        plan: of its prompt.
        past: how many columns came before; 0 in the prefill.
        mask: (B, columns so far) which are no padding, if it is known.
        made: masks and rotations of its steps, by segment, with what they were made from: layers share them.
    """

    plan: Plan
    past: int
    mask: Tensor | None
    made: dict[tuple[str, int, int], tuple[Any, Any]] = field(default_factory=dict)


class Stages:
    """The stages of one model.

    Args:
        schedule: when they run.
        decoder: of the model.
        visual_ids: ids of visual placeholders.

    Attributes:
        around: what is opened around all that stages compute beside the layers, for whoever counts or times it.
    """

    def __init__(self, schedule: Schedule, decoder: Decoder, visual_ids: Sequence[int]) -> None:
        self.schedule = schedule
        self.decoder = decoder
        self.visual_ids = tuple(visual_ids)
        self._ids: dict[torch.device, Tensor] = {}
        self._boundaries = {point.boundary: number for number, point in enumerate(schedule.points)}
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._logs: list[list[Plan]] = []
        self._is_paused = False
        for point in schedule.points:
            _check_positions(point, decoder)

    @contextmanager
    def attached(self, model: nn.Module | None) -> Iterator[Stages]:
        """While open, the model's visual tokens are cut inside the LLM.

        Args:
            model: the outer model, which is called with ids; None where a plan is handed to the language model.

        Raises:
            PruningError: if stages are attached already.
        """
        with ExitStack() as undo:
            if model is not None:
                check_none_attached(model)
                hook = model.register_forward_pre_hook(_Outer(self), with_kwargs=True)
                undo.callback(hook.remove)
            inner = self.decoder.model
            undo.callback(inner.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            undo.callback(inner.register_forward_hook(self._end, with_kwargs=True).remove)
            for number, layer in enumerate(self.decoder.layers):
                own = partial(self._layer, number)
                undo.callback(layer.register_forward_pre_hook(own, with_kwargs=True).remove)
            yield self

    @contextmanager
    def noted(self) -> Iterator[list[Plan]]:
        """While open, collect the plan of every prefill."""
        plans: list[Plan] = []
        self._logs.append(plans)
        try:
            yield plans
        finally:
            self._logs[:] = [log for log in self._logs if log is not plans]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While open, the model runs as if they were not attached."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    # ---- the outer model: a plan of the prompt -----------------------------------------------------------------

    def plan(
        self, inputs: Mapping[str, Any], asked: Mapping[str, Any], schedules: Sequence[Schedule] | None = None
    ) -> Plan:
        """Return the plan of a batch.

        Args:
            inputs: ids, mask and labels.
            asked: what the model is called with: the same rows, perhaps without labels.
            schedules: of each row, with the places of this one's and budgets of their own; None is this one's for all.

        Raises:
            PruningError: if it was laid out in another way.
        """
        ids = inputs["input_ids"]
        if asked["input_ids"].shape != ids.shape:
            raise PruningError(
                f"stages need samples in rows of their own, and {tuple(ids.shape)} became "
                f"{tuple(asked['input_ids'].shape)}; set engine.packing: false"
            )
        visual = self._are_visual(ids)
        plan = plan_of(self.schedule, visual, inputs.get("attention_mask"), inputs.get("labels"), schedules)
        for log in self._logs:
            log.append(plan)
        return plan

    def _are_visual(self, ids: Tensor) -> Tensor:
        """Return which ids are visual placeholders."""
        if ids.device not in self._ids:
            self._ids[ids.device] = torch.tensor(self.visual_ids, device=ids.device)  # once: a copy stalls a step
        return torch.isin(ids, self._ids[ids.device])

    def _plan(self, kwargs: dict[str, Any]) -> Plan | None:
        """Return the plan of a call of the outer model; None beyond the prefill, where the cache has it."""
        if kwargs.get(PLAN) is not None:
            given: Plan = kwargs[PLAN]
            return given
        cache = kwargs.get("past_key_values")
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if cache is not None:
            check_cache(cache)
        if ids is None:
            raise PruningError("stages find visual tokens by their ids: call the model with input_ids")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise PruningError(
                "stages need the 2-D attention_mask, got one that was made for the layers; generate with a dynamic "
                "cache (cache_implementation: null), or pass the processor's mask"
            )
        if is_begun(cache):
            if ids.shape[1] > 1 and bool(self._are_visual(ids).any()):
                raise PruningError(
                    "visual tokens behind the first call can't be cut: prefill in one piece (no prefill_chunk_size), "
                    "and give all images in the first turn"
                )
            return None
        return self.plan(kwargs, kwargs)

    # ---- the language model: which plan, and back to the full length -------------------------------------------

    def _begin(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if self._is_paused:
            return None
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        past = 0 if cache is None else int(cache.get_seq_length())
        plan = kwargs.get(PLAN)
        if plan is None and past:
            plan = getattr(cache, PLAN, None)
            if plan is None:
                raise PruningError("this cache was made without stages, so they can't go on from it; begin anew")
        if plan is None:
            raise PruningError(
                "no plan reached the language model, which finds no visual tokens by itself: while stages are "
                "attached, call the outer model, with input_ids"
            )
        if self.decoder.window is not None and self._reach(args, kwargs, past) > self.decoder.window:
            raise PruningError(
                f"the sequence is longer than the model's sliding window of {self.decoder.window}, which counts what "
                "is left and would show more after a stage; ask shorter, or leave pruning.stages out"
            )
        columns = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        return args, {**kwargs, PLAN: Call(plan, past, columns)}

    def _reach(self, args: tuple, kwargs: dict[str, Any], past: int) -> int:
        """Return how many columns there are with this call's."""
        for name in ("inputs_embeds", "input_ids"):
            if kwargs.get(name) is not None:
                return past + int(kwargs[name].shape[1])
        return past + (int(args[0].shape[1]) if args else 0)

    def _end(self, _: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self._is_paused:
            return output
        call: Call = kwargs[PLAN]
        call.plan.check_left()
        call.plan.forget_made()
        segment = call.plan.before(self.schedule.layers)
        if call.past or segment is None:
            return output
        left_out = segment.filler
        if segment.merged is not None:
            left_out = segment.merged if left_out is None else left_out | segment.merged
        full = scattered(output.last_hidden_state, segment.columns, left_out, call.plan.width)
        output.last_hidden_state = full
        return output

    # ---- the layers --------------------------------------------------------------------------------------------

    def _layer(
        self, number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if self._is_paused:
            return None
        kwargs = dict(kwargs)
        call: Call = kwargs.pop(PLAN)
        plan, hidden = call.plan, args[0]
        if call.past:
            return args, self._decoding(number, call, hidden, kwargs)
        if number == 0:
            self._enter(plan, hidden, kwargs.get("past_key_values"))
        boundary = self._boundaries.get(number)
        if boundary is not None:
            self._decide(boundary, plan, hidden, kwargs["position_embeddings"])
            made = plan.segments[number]
            if made is not None:
                with self.around():
                    hidden = made.apply(hidden)
        segment = plan.before(number)
        rotary = self._rotary(segment, kwargs["position_embeddings"], hidden)
        above = self._boundaries.get(number + 1)
        if above is not None and self.schedule.points[above].stage.listens == -1:
            self._listen(above, plan, segment, number, hidden, rotary)
        if segment is None:
            return args, kwargs
        kwargs["position_embeddings"] = rotary
        kwargs["attention_mask"] = self._mask(segment, kwargs.get("attention_mask"), hidden.dtype)
        if "position_ids" in kwargs:
            kwargs["position_ids"] = None  # flash attention would read gaps as packed samples
        return (hidden, *args[1:]), kwargs

    def _enter(self, plan: Plan, embeddings: Tensor, cache: Any) -> None:
        """Hand a plan to the cache, and look at what enters the first layer."""
        if cache is not None:
            # Here and not before: a plain call makes its cache after the language model's hook ran.
            check_cache(cache)
            setattr(cache, PLAN, plan)
        self._find_raters(plan, embeddings)

    def _rotary(self, segment: Segment | None, whole: Rotary, hidden: Tensor) -> Rotary:
        """Return cosines and sines of a segment's slots."""
        if segment is None:
            return whole
        key = ("rotary", id(whole[0]))
        if key not in segment.made:
            if segment.dense:
                made = self.decoder.rotary(hidden, segment.positions())
            else:
                made = at_slots(whole, segment.columns)
            segment.made[key] = (whole, made)  # with what it was made from, so that its id stays its own
        rotary: Rotary = segment.made[key][1]
        return rotary

    def _mask(self, segment: Segment, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return the mask of a segment; None stays None where every slot is a token."""
        if mask is None and segment.filler is None:
            return None
        key = ("mask", id(mask))
        if key not in segment.made:
            segment.made[key] = (mask, self._cut(segment, mask, dtype))
        made: Tensor = segment.made[key][1]
        return made

    def _cut(self, segment: Segment, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        kind = self.decoder.mask
        if kind == "columns" and (mask is None or mask.ndim == 2):
            return segment.shown if mask is None else segment.shown.to(mask.dtype)
        if mask is None or segment.merged is not None:
            return causal_mask(segment.shown, mask, kind, dtype)
        _check_mask(mask)
        return cut_mask(mask, segment.columns, segment.filler)

    # ---- hearing and deciding ----------------------------------------------------------------------------------

    @torch.no_grad()
    def _find_raters(self, plan: Plan, embeddings: Tensor) -> None:
        """Let stages that choose their query rows themselves do so, by what enters the first layer."""
        # Of each stage once, however many boundaries it has.
        found: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        for point in self.schedule.points:
            if point.stage.queries != "raters":
                continue
            own = id(point.stage)
            if own not in found:
                with self.around(), exact_float32(embeddings.device):
                    raters = point.stage.raters(embeddings.detach().float(), plan.visual, plan.question())
                # Of a prompt without any, its last token.
                last = torch.zeros_like(raters).scatter(1, plan.queries[:, :1], True)
                raters = torch.where(raters.any(dim=1, keepdim=True), raters, last)
                most = int(raters.sum(dim=1).max())
                columns = torch.sort((~raters).long(), dim=1, stable=True).indices[:, :most]
                found[own] = raters, (columns, raters.gather(1, columns))
            plan.raters[point.boundary], plan.asked[point.boundary] = found[own]

    def _must_run(self, number: int, plan: Plan) -> bool:
        """Return whether a stage runs: also for nothing under ZeRO-3, whose ranks gather weights in step."""
        return plan.drops(number) or is_partitioned(self.decoder.model.parameters())

    @torch.no_grad()
    def _listen(
        self, number: int, plan: Plan, segment: Segment | None, layer: int, hidden: Tensor, rotary: Rotary
    ) -> None:
        """Take down what a stage hears of one layer."""
        point = self.schedule.points[number]
        if not self._must_run(number, plan):
            return
        with self.around(), exact_float32(hidden.device):
            plan.noted[point.boundary] = self._heard(point, plan, segment, layer, hidden.detach(), rotary)

    def _heard(
        self, point: Point, plan: Plan, segment: Segment | None, layer: int, hidden: Tensor, rotary: Rotary
    ) -> dict[str, Tensor]:
        """Return what a stage hears of one layer, by name."""
        wanted = point.stage.wants
        module = self.decoder.layers[layer]
        hidden = hidden.to(module.input_layernorm.weight.dtype)  # under autocast it may be another
        found: dict[str, Tensor] = {}
        queries, there = self._queries(point, plan)
        slots = plan.slots_of(queries, segment)
        if "attention" in wanted:
            shown = plan.shown(segment)
            found["attention"] = attention_of(module, hidden, rotary, slots, there, shown)
            found["rows"] = there
        if "keys" in wanted:
            # Not only distances but positions themselves decide: they count from a row's first token.
            first = plan.shown(segment).long().argmax(dim=1, keepdim=True)
            keys = keys_of(module, hidden, counted_from(rotary, first))
            found["keys"] = keys.transpose(1, 2).flatten(2)
        if "unit_scores" in wanted:
            found["unit_scores"] = unit_scores_of(module, rotary, slots)
        return found

    def _queries(self, point: Point, plan: Plan) -> tuple[Tensor, Tensor]:
        """Return the columns whose attention a stage hears, and which of them exist."""
        if point.stage.queries == "answers":
            return plan.queries, plan.there
        if point.stage.queries == "last":
            return plan.queries[:, :1], plan.there[:, :1]
        return plan.asked[point.boundary]

    @torch.no_grad()
    def _decide(self, number: int, plan: Plan, hidden: Tensor, whole: Rotary) -> None:
        """Let the stage of a boundary choose, and take it down."""
        point = self.schedule.points[number]
        if not self._must_run(number, plan):
            plan.decide(number, None, False)
            return
        segment = plan.before(point.boundary)
        if point.stage.listens == 0:
            self._listen(number, plan, segment, point.boundary, hidden, self._rotary(segment, whole, hidden))
        found = plan.noted.pop(point.boundary, {})
        if "states" in point.stage.wants:
            found["states"] = hidden.detach().float()
        question = plan.at_slots(plan.question(), segment)
        with self.around(), exact_float32(hidden.device):
            if "normed" in point.stage.wants:
                found["normed"] = self.decoder.final_norm(hidden.detach()).float()
            heard = Heard(plan.visual_slots(segment), question, **found, counts=plan.entering(number))
            choice = point.stage.choose(heard, [counts.keep[number] for counts in plan.counts])
        plan.decide(number, choice, point.stage.dense)

    # ---- decoding ----------------------------------------------------------------------------------------------

    def _decoding(self, number: int, call: Call, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return a layer's keyword arguments of a step behind the prefill."""
        segment = call.plan.before(number)
        if segment is None:
            return kwargs
        if segment.dense:
            rotary = ("rotary", id(segment), 0)
            if rotary not in call.made:
                call.made[rotary] = (None, self._decoding_rotary(segment, call, hidden))
            kwargs["position_embeddings"] = call.made[rotary][1]
        mask = kwargs.get("attention_mask")
        key = ("mask", id(segment), id(mask))  # some models have a mask for each kind of layer
        if key not in call.made:
            call.made[key] = (mask, self._decoding_mask(segment, call, hidden.shape[1], mask, hidden.dtype))
        kwargs["attention_mask"] = call.made[key][1]
        if "position_ids" in kwargs:
            kwargs["position_ids"] = None
        return kwargs

    def _decoding_rotary(self, segment: Segment, call: Call, hidden: Tensor) -> Rotary:
        """Return cosines and sines of new tokens that are numbered on from what is left of the prompt."""
        new, width = hidden.shape[1], call.plan.width
        begun = segment.shown.sum(dim=1, keepdim=True)
        if call.mask is None:
            later = torch.arange(call.past - width, call.past - width + new, device=hidden.device)[None]
        else:
            later = (call.mask[:, width:].long().cumsum(dim=1) - 1).clamp(min=0)[:, -new:]
        return self.decoder.rotary(hidden, begun + later)

    def _decoding_mask(
        self, segment: Segment, call: Call, new: int, mask: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        width = call.plan.width
        kind = self.decoder.mask
        if mask is None:
            if segment.filler is None:
                return None
            seen = decode_seen(segment.shown, (new, call.past - width + new))
            return seen[:, 0, -1] if kind == "columns" else as_mask(seen, None, kind, dtype)
        if mask.shape[-1] != call.past + new:
            raise PruningError(
                f"a mask of {mask.shape[-1]} columns for {call.past + new} tokens can't be cut; generate with a plain "
                "DynamicCache, and below the model's sliding window"
            )
        if mask.ndim == 2:
            return torch.cat([segment.shown.to(mask.dtype), mask[:, width:]], dim=1)
        _check_mask(mask)
        prompt = segment.shown[:, None, None, :].expand(-1, 1, new, -1)
        later = mask[..., width:].expand(len(prompt), -1, -1, -1)
        return torch.cat([as_mask(prompt, mask, kind, dtype).expand(-1, later.shape[1], -1, -1), later], dim=3)


class _Outer:
    """The outer model's hook; its type tells that stages are attached, and its ``owner`` whose."""

    def __init__(self, owner: Stages) -> None:
        self.owner = owner

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if self.owner._is_paused:
            return None
        if args:
            raise PruningError("a model with attached stages takes keyword arguments only")
        _check_no_states(model, kwargs)
        plan = self.owner._plan(kwargs)
        return None if plan is None else (args, {**kwargs, PLAN: plan})


def _check_no_states(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    asked = kwargs.get("output_hidden_states")
    if asked is None:
        asked = getattr(model.config, "output_hidden_states", False)
    if asked:
        raise PruningError(
            "output_hidden_states can't be asked with pruning.stages: states of each layer are of what is left there, "
            "in rows of another length and order; leave it out, logits and the last state have the prompt's length"
        )


def is_begun(cache: Any) -> bool:
    """Return whether a cache holds anything, so that the prefill is over."""
    return cache is not None and int(cache.get_seq_length()) > 0


def attached_to(model: nn.Module) -> Stages | None:
    """Return the stages that are attached to a model and not paused."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, _Outer) and not hook.owner._is_paused:
            return hook.owner
    return None


def check_none_attached(model: nn.Module) -> None:
    """Check that no stages are attached to a model.

    Raises:
        PruningError: if there are: what prunes before the LLM must come first, or they would look for visual tokens in
            ids that are rewritten after them.
    """
    if attached_to(model) is not None:
        raise PruningError(
            "stages are attached to this model already, and what is attached after them would rewrite the tokens that "
            "they have read; give one PrunedModel both the pruner and the stages"
        )


def check_generation(model: Any, options: Mapping[str, Any]) -> None:
    """Check that generation runs a prompt in one piece and keeps its cache; hooks can't see that it does not.

    Args:
        model: the stock model.
        options: of generation.

    Raises:
        PruningError: in one line, naming the option.
    """
    configs = [options.get("generation_config"), getattr(model, "generation_config", None)]

    def value(name: str) -> Any:
        if name in options:
            return options[name]
        own = (getattr(config, name, None) for config in configs if config is not None)
        return next((found for found in own if found is not None), None)

    for name, why in _ONE_AT_A_TIME.items():
        if value(name) not in (None, _OFF.get(name)):
            raise PruningError(f"{name} can't run with pruning.stages: {why}; leave it out")
    if value("use_cache") is False:
        raise PruningError(
            "use_cache: False can't run with pruning.stages: each step would choose anew, by a token that was "
            "generated; leave it out"
        )
    kind = value("cache_implementation")
    if kind not in (None, "dynamic", "hybrid"):  # the last two mean what None does
        raise PruningError(
            f"cache_implementation: {kind!r} can't run with pruning.stages: its layers have one length; leave it out"
        )


def _check_positions(point: Point, decoder: Decoder) -> None:
    if point.stage.dense and not decoder.one_rotary():
        raise PruningError(
            f"stage {point.name!r} numbers tokens anew, which a model with other rotations for each kind of layer "
            "can't have; choose original positions in its options, or another stage"
        )


def _check_mask(mask: Any) -> None:
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise PruningError(
            f"a {type(mask).__name__} as the layers' mask can't be cut; set attn_implementation to sdpa or eager"
        )
