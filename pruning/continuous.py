"""Continuous batching of pruned prompts: stock paged generation, which takes ids alone, with visual tokens as ids.

Each kept visual token gets an id of its own beyond the vocabulary, and the input embedding gives its feature for it.
"""

from __future__ import annotations

import copy
import os
import queue
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, PreTrainedModel

from prunetune.pruning.errors import PruningError, not_in
from prunetune.pruning.families.base import Family
from prunetune.pruning.hooks import stood_in
from prunetune.pruning.prefix import features_by_image
from prunetune.pruning.rewrite import Pruned

_LAST_ID = 2**31 - 1
"""Ids are 32 bits wide in stock paged generation."""

_ONE_ANSWER = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "do_sample": False}
"""Options that paged generation has one value of here."""

_UNREAD = ("stop_strings", "prompt_lookup_num_tokens", "max_time", "constraints", "force_words_ids", "penalty_alpha")
"""Options of plain generation that paged generation does not look at."""

_SCORES_ALONE = ("SuppressTokensLogitsProcessor", "InfNanRemoveLogitsProcessor")
"""Processors of logits that look at nothing else, of which stock classes do not say so."""

_PAGE = 32
"""Tokens of a page of the cache on a CPU; the stock 256 would leave most of it empty under short prompts."""

_STEP = 256
"""Tokens that one step on a CPU computes at most, of all prompts together: more is slower there."""

_ON_GPU = 0.7
"""Part of the free GPU memory that transformers may take for the cache; towers and selection need theirs beside it."""


@dataclass(frozen=True)
class LonePrompt:
    """One pruned prompt by itself.

    Attributes:
        ids: its token ids, those of visual tokens among them.
        visual: the places of its visual tokens, in order.
        features: (K, D) of these tokens.
    """

    ids: list[int]
    visual: list[int]
    features: Float[Tensor, "K D"]


def why_not_continuous(family: Family) -> str | None:
    """Return why paged generation would not give a family's answers; None if it does.

    Paged generation makes positions 0, 1, 2, ... itself, masks causally, and hands nothing on but ids.
    """
    if family.unproven:
        return "has no family of its own, and nobody has looked what its LLM is given beside token ids"
    if family.counts_rows_and_columns:
        return "has positions of rows and columns, and paged generation counts tokens"
    if not family.causal or family.aligned:
        return "has visual tokens that see what follows them, and paged generation masks causally"
    if family.first_position:
        return f"counts positions from {family.first_position}, and paged generation from 0"
    return None


def check_continuous(
    model: PreTrainedModel,
    family: Family,
    position_policy: str,
    has_stages: bool,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Check that continuous batching gives the answers of plain generation.

    Args:
        model: the stock model.
        family: its family.
        position_policy: of the pruned model: "compact" or "original".
        has_stages: whether it prunes inside the LLM.
        options: of generation, over the model's own.

    Raises:
        PruningError: in one line, with what stands in the way.
    """
    name = model.config.model_type if family.unproven else family.name
    why = why_not_continuous(family)
    if why is not None:
        raise not_in("continuous", f"can't run {name!r}, which {why}")
    if has_stages:
        raise not_in("continuous", "can't run pruning.stages, whose layers have other lengths")
    if position_policy != "compact":
        raise PruningError(
            f"backend: continuous numbers tokens anew, and position_policy is {position_policy}; set it to compact, or "
            "backend to plain"
        )
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    if attention != "sdpa" and not attention.startswith("flash_attention"):
        raise PruningError(
            f"backend: continuous needs model.attention sdpa or flash_attention_2, and it is {attention}; choose one, "
            "or backend plain"
        )
    _settings(model, options)


def _settings(model: Any, options: Mapping[str, Any] | None = None) -> Any:
    """Return the model's generation options for greedy paged generation; raises PruningError for what it can't do."""
    settings = copy.deepcopy(model.generation_config)
    settings.do_sample = False  # as evaluations ask, whatever a checkpoint recommends
    settings.max_length = None
    settings.update(**dict(options or {}))
    for name, only in _ONE_ANSWER.items():
        value = getattr(settings, name, None)
        if value is not None and value != only:
            raise not_in("continuous", f"can't run {name}: {value}, only {only}")
    for name in _UNREAD:
        if getattr(settings, name, None) is not None:
            raise not_in("continuous", f"does not read {name}, which the model's generation has set")
    for processor in model._get_logits_processor(settings):
        kind = type(processor).__name__
        if kind not in _SCORES_ALONE and getattr(processor, "supports_continuous_batching", None) is not True:
            raise not_in(
                "continuous",
                f"can't run {kind}, which the model's generation options ask for: it reads the ids before a token",
            )
    return settings


def lone_prompts(model: PreTrainedModel, family: Family, pruned: Pruned) -> list[LonePrompt]:
    """Return the rows of a pruned batch without padding, each with its visual tokens.

    Raises:
        PruningError: if visual tokens enter layers beyond the first, or the batch brings other positions.
    """
    ids, mask = pruned.inputs["input_ids"].cpu(), pruned.inputs["attention_mask"].bool().cpu()
    positions = pruned.inputs.get("position_ids")
    if positions is not None and not torch.equal(positions.cpu()[mask], (mask.cumsum(1) - 1)[mask]):
        raise not_in("continuous", "numbers tokens 0, 1, 2, ..., and the batch has other positions")
    tokens = {modality: family.token_id(model, modality) for modality in family.pixels}
    found: list[dict[str, list[Tensor]]] = [{} for _ in ids]
    for modality, output in (pruned.inputs.get("mm_encoder_outputs") or {}).items():
        if output.deepstack_features:
            raise not_in("continuous", "can't hand deepstack features on")
        for row, features in zip(pruned.rows[modality], features_by_image(output, pruned.kept[modality]), strict=True):
            found[row].setdefault(modality, []).append(features)
    prompts = []
    for row, own in enumerate(ids):
        kept = own[mask[row]]
        prompts.append(_lone_prompt(kept, {tokens[name]: torch.cat(parts) for name, parts in found[row].items()}))
    return prompts


def _lone_prompt(ids: Int[Tensor, " L"], features: Mapping[int, Float[Tensor, "K D"]]) -> LonePrompt:
    """Return a prompt whose visual tokens stand in the order of their places, whatever their modality.

    Args:
        ids: without padding.
        features: by placeholder, in reading order.
    """
    if not features:
        return LonePrompt(ids.tolist(), [], torch.zeros(0, 0))
    places = {token: (ids == token).nonzero()[:, 0] for token in features}
    for token, own in features.items():
        # Of the rewriting, which pairs them; an off-by-one here would raise nothing and answer something else.
        assert len(places[token]) == len(own), (token, len(places[token]), len(own))
    every, order = torch.cat(list(places.values())).sort()
    rows = torch.cat(list(features.values()))
    return LonePrompt(ids.tolist(), every.tolist(), rows[order.to(rows.device)])


class FeatureRows:
    """Visual tokens of the prompts in flight, found by ids beyond the vocabulary.

    Ids count upwards and are never given twice, so that nothing that remembers a prompt by its ids takes one picture
    for another; the row of an id is its remainder. With a vocabulary of 100 and 8 rows the first picture of 3 tokens
    has ids 100 to 102 in rows 0 to 2, and the third may not have its ids before the first one's rows are free.

    Args:
        embedding: the model's input embedding, which :meth:`embed` stands in for.
        capacity: rows (N, D).
    """

    def __init__(self, embedding: nn.Module, capacity: int) -> None:
        weight = embedding.get_parameter("weight")
        self.vocabulary = len(weight)
        # One tensor that is never replaced: recorded CUDA graphs read it by its address.
        self.rows = torch.zeros(capacity, weight.shape[1], dtype=weight.dtype, device=weight.device)
        self._words = embedding.forward
        self._next = 0
        self._live: dict[int, int] = {}  # the first number of a prompt's tokens, and how many they are
        self._changed = threading.Condition()

    def put(self, features: Float[Tensor, "K D"], wait: bool = True) -> range | None:
        """Store a prompt's visual tokens and return their ids; None if there is no room, which may be waited for."""
        count = len(features)
        if not count:
            return range(0)
        if count > len(self.rows):
            why = f"a prompt has {count} visual tokens, and {len(self.rows)} rows are kept for all"
            raise PruningError(f"{why}; set backend: plain")
        with self._changed:
            while self._next + count - min(self._live, default=self._next) > len(self.rows):
                if not wait:
                    return None
                self._changed.wait()
            first = self._next
            if self.vocabulary + first + count > _LAST_ID:
                raise PruningError("continuous batching has used all ids there are for visual tokens; begin it anew")
            self._next += count
            self._live[first] = count
        places = torch.arange(first, first + count, device=self.rows.device) % len(self.rows)
        self.rows.index_copy_(0, places, features.detach().to(self.rows))
        if self.rows.is_cuda:
            torch.cuda.current_stream(self.rows.device).synchronize()  # generation runs on a stream of its own
        return range(self.vocabulary + first, self.vocabulary + first + count)

    def drop(self, ids: range) -> None:
        """Free the rows of a prompt that has its answer."""
        with self._changed:
            self._live.pop(ids.start - self.vocabulary, None)
            self._changed.notify_all()

    def embed(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """Return what the model's embedding gives for words, and features for visual tokens."""
        # Without a look at the values, for which a GPU would be waited for and no graph could be recorded.
        visual = ids >= self.vocabulary
        words = self._words(ids.masked_fill(visual, 0))
        places = ((ids - self.vocabulary) % len(self.rows)).long()
        return torch.where(visual[..., None], self.rows[places], words)


class Request:
    """One prompt in flight: iterate over it for the new tokens as they come, or wait for all of them.

    Attributes:
        prompt_tokens: length of the prompt.
        visual_tokens: how many of it are visual.
    """

    def __init__(self, batch: ContinuousBatch, name: str, ids: range, prompt: LonePrompt) -> None:
        self.prompt_tokens = len(prompt.ids)
        self.visual_tokens = len(prompt.visual)
        self._batch, self._name, self._ids = batch, name, ids
        self._new: queue.SimpleQueue[list[int] | Exception | None] = queue.SimpleQueue()
        self._tokens: list[int] = []
        self._ended = threading.Event()
        self._sent = 0

    @property
    def done(self) -> bool:
        """Whether the answer is there, or will never be."""
        return self._ended.is_set()

    def __iter__(self) -> Iterator[int]:
        """Yield new token ids as they are generated, the one that ends the answer included.

        Raises:
            PruningError: if generation failed.
        """
        while isinstance(new := self._new.get(), list):
            self._tokens += new
            yield from new
        self._new.put(new)  # who asks again hears it again
        if new is not None:
            raise new

    def result(self) -> list[int]:
        """Wait for the end and return all new token ids; of a request that was cancelled, those it had."""
        for _ in self:
            pass
        return list(self._tokens)

    def cancel(self) -> None:
        """Stop generating for it."""
        self._batch._cancel(self)

    def _received(self, tokens: Sequence[int], last: bool) -> None:
        new, self._sent = list(tokens[self._sent :]), len(tokens)
        if new:
            self._new.put(new)
        if last:
            self._end(None)

    def _end(self, why: Exception | None) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self._new.put(why)


class ContinuousBatch:
    """A running batch that prompts join and leave at any time; greedy, and token for token plain generation's.

    It is a context manager: while it is open a thread generates, and another one hands tokens on. ``submit`` may be
    called from several threads. The model may prune and encode other prompts meanwhile, and generates no other way.

    Args:
        model: the stock model; :func:`check_continuous` is for its caller.
        family: its family.
        requests: how many prompts are computed together at most.
        max_new_tokens: longest answer of a request that names no other.
        cache_tokens: prompt and answer tokens that are held at once; None derives it from memory.
        step_tokens: tokens that one step computes, of all prompts; longer prompts take several. None derives it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        requests: int,
        max_new_tokens: int,
        cache_tokens: int | None = None,
        step_tokens: int | None = None,
    ) -> None:
        self.model, self.family = model, family
        self.max_new_tokens = max_new_tokens
        self.capacity = 0
        self._config = paged_config(model, requests, cache_tokens, step_tokens)
        self._requests: dict[str, Request] = {}
        self._lock = threading.Lock()
        self._undo = ExitStack()
        self._count = 0
        self._closed: str | None = "is not open"

    def __enter__(self) -> ContinuousBatch:
        """Begin to generate.

        Raises:
            PruningError: if the model runs another one, or the cache does not fit into memory.
        """
        embedding: Any = self.model.get_input_embeddings()
        if isinstance(getattr(embedding.__dict__.get("forward"), "__self__", None), FeatureRows):
            raise PruningError("the model runs a continuous batch already, whose ids another one would give again")
        # Another thread writes to what is made here, which it may not where it belongs to inference mode.
        with torch.inference_mode(False):
            self._manager = self._begun()
            self.capacity = self._manager.batch_processor.cache.max_tokens_read
            self.rows = FeatureRows(embedding, self.capacity)
        with ExitStack() as undo:
            undo.callback(self._manager.destroy)
            undo.enter_context(stood_in(embedding, self.rows.embed))
            self._manager.start()
            self._undo = undo.pop_all()  # until here, what fails leaves the model as it was
        self._closed = None
        self._thread = threading.Thread(target=self._hand_on, name="continuous answers", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Finish what is in flight; after an error, drop it."""
        self._closed = "is closed"
        with self._undo:  # the model is a stock one again, whatever becomes of the threads
            self._manager.stop(block=True, hard_stop=kind is not None)
            self._thread.join()

    def _begun(self) -> Any:
        """Return the stock manager with its cache, which generates nothing yet."""
        model: Any = self.model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            manager = model.init_continuous_batching(
                generation_config=_settings(model, {"max_new_tokens": self.max_new_tokens}),
                continuous_batching_config=self._config,
            )
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):  # it is seeded there, for answers that are drawn
                manager.warmup()  # makes the cache here, where an error is the caller's
        except (MemoryError, ValueError, torch.OutOfMemoryError) as error:
            raise PruningError(
                f"the cache of backend: continuous does not fit: {str(error).splitlines()[0]}; lower batch_size or "
                "backend_options.cache_tokens, or set backend: plain"
            ) from error
        return manager

    def submit(self, prompt: LonePrompt, max_new_tokens: int | None = None, streaming: bool = False) -> Request:
        """Add a prompt; waits while there is no room for its visual tokens.

        Args:
            prompt: of :func:`lone_prompts`.
            max_new_tokens: longest answer; None is the batch's.
            streaming: hand on every token as it comes, else all of them at the end.

        Raises:
            PruningError: for a prompt that is longer than the cache with its answer, or if generation has stopped.
        """
        if self._closed is not None:
            raise PruningError(f"the continuous batch {self._closed}")
        longest = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        if len(prompt.ids) + longest > self.capacity:
            raise PruningError(
                f"a prompt of {len(prompt.ids)} tokens and an answer of {longest} do not fit into the cache of "
                f"{self.capacity}; raise backend_options.cache_tokens, or set backend: plain"
            )
        ids = self.rows.put(prompt.features)
        assert ids is not None  # it has waited
        tokens = list(prompt.ids)
        for place, own in zip(prompt.visual, ids, strict=True):
            tokens[place] = own
        with self._lock:
            if self._closed is not None:  # while it waited
                self.rows.drop(ids)
                raise PruningError(f"the continuous batch {self._closed}")
            name = f"prompt {self._count}"
            self._count += 1
            request = Request(self, name, ids, prompt)
            self._requests[name] = request
        self._manager.add_request(tokens, name, max_new_tokens=longest, streaming=streaming)
        return request

    def _cancel(self, request: Request) -> None:
        if self._left(request._name) is not None:
            self._manager.cancel_request(request._name)
            request._end(None)

    def _left(self, name: str) -> Request | None:
        """Return a request that leaves, with its rows freed; None if it has left."""
        with self._lock:
            request = self._requests.pop(name, None)
        if request is not None:
            self.rows.drop(request._ids)
        return request

    def _hand_on(self) -> None:
        """Give every request its tokens until generation ends."""
        manager = self._manager
        while True:
            running = manager.is_running()  # before looking: what comes between the two is seen
            output = manager.get_result(timeout=0.1) if running else _waiting(manager)
            if output is None and not running:
                break
            if output is not None:
                self._hand(output)
        self._fail(manager.background_thread_status.fatal_error)

    def _hand(self, output: Any) -> None:
        if output.error is not None:
            request = self._left(output.request_id)
            if request is not None:
                request._end(PruningError(f"continuous batching failed: {output.error}"))
            return
        last = output.is_finished()
        request = self._left(output.request_id) if last else self._requests.get(output.request_id)
        if request is not None:  # else it was cancelled
            request._received(output.generated_tokens, last)

    def _fail(self, why: Exception | None) -> None:
        """End what is in flight, and take nothing more."""
        words = "was closed" if why is None else f"failed: {str(why).splitlines()[0] if str(why) else repr(why)}"
        with self._lock:
            self._closed = self._closed or words
            names = list(self._requests)
        for name in names:
            request = self._left(name)
            if request is not None:
                request._end(PruningError(f"the continuous batch {words}"))


def _waiting(manager: Any) -> Any:
    """Return an output that is there already."""
    try:
        return manager.output_router.output_queue.get_nowait()
    except queue.Empty:
        return None


def paged_config(
    model: PreTrainedModel, requests: int, cache_tokens: int | None = None, step_tokens: int | None = None
) -> ContinuousBatchingConfig:
    """Return how large the cache and a step are; on a GPU what is None is transformers' to choose.

    Args:
        model: the stock model.
        requests: how many prompts are computed together at most.
        cache_tokens: prompt and answer tokens that are held at once.
        step_tokens: tokens of one step.
    """
    config = ContinuousBatchingConfig(
        max_requests_per_batch=requests,
        # Remembered blocks of prompts that are gone would serve text before an image alone, and no page is that short.
        allow_block_sharing=False,
        # Flash attention rounds otherwise than what plain runs with, and would be fetched from the hub.
        auto_switch_to_flash=False,
    )
    on_cpu = model.device.type == "cpu"
    config.max_batch_tokens = max(step_tokens or _STEP, requests) if on_cpu or step_tokens else None
    config.max_memory_percent = None if on_cpu else _ON_GPU
    if on_cpu:
        config.page_size = _PAGE
        cache_tokens = cache_tokens or _cpu_cache(model, requests)
    if cache_tokens is not None:
        config.num_blocks = -(-cache_tokens // config.page_size)
    return config


def _cpu_cache(model: PreTrainedModel, requests: int) -> int:
    """Return how many tokens are held at once on a CPU: the longest prompt, and 1,024 a request, as memory allows."""
    text: Any = model.config.get_text_config(decoder=True)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    one = 2 * text.num_hidden_layers * heads * head * model.dtype.itemsize
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    wanted = max(requests * 1024, text.max_position_embeddings)
    return max(min(wanted, free // 4 // one), _PAGE)
