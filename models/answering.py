"""Batch after batch of questions to one arm, by one of the ways that generation has."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from prunetune.configs import Backend, BackendOptions
from prunetune.data_recipes.formatting import Formatter
from prunetune.data_recipes.sample import Sample
from prunetune.models.arm import Answer, Arm
from prunetune.pruning import Generated
from prunetune.pruning.continuous import Request
from prunetune.pruning.static import forget_compiled

if TYPE_CHECKING:
    from prunetune.models.features import FeatureFormatter

_AHEAD = 3
"""Batches of questions that are encoded and wait for answers at most; the first of them is waited for."""

Batches = Iterable[tuple["Formatter | FeatureFormatter", Sequence[Sample]]]
"""A formatter of the arm's, and questions."""


def check_backend(arm: Arm, backend: Backend, share_prefix: bool) -> None:
    """Check that an arm can answer that way.

    Args:
        arm: which.
        backend: "plain", "continuous" or "static".
        share_prefix: whether beginnings are shared.

    Raises:
        PruningError: in one line, for a model or a method that can't.
    """
    if share_prefix:
        arm.check_shares_prefix()
    if backend == "continuous":
        arm.pruned.check_continuous()
    if backend == "static":
        arm.pruned.check_static()


def answered(
    arm: Arm,
    batches: Batches,
    max_new_tokens: int,
    batch_size: int,
    backend: Backend = "plain",
    options: BackendOptions | None = None,
    share_prefix: bool = False,
) -> Generator[list[Answer]]:
    """Yield the greedy answers to each batch, in order.

    Args:
        arm: which.
        batches: each is taken when there is room for it.
        max_new_tokens: longest answer in tokens.
        batch_size: of the batches; for ``continuous`` also how many prompts are computed together at most.
        backend: "plain", "continuous" or "static".
        options: of that backend.
        share_prefix: of ``plain``, see `Arm.answer`.
    """
    options = BackendOptions() if options is None else options
    if backend == "continuous":
        yield from _continuously(arm, batches, max_new_tokens, batch_size, options)
    elif backend == "static":
        try:
            for formatter, samples in batches:
                # A shorter batch would be compiled for itself.
                more = max(batch_size - len(samples), 0) if options.compile else 0
                filled = [*samples, *[samples[-1]] * more]
                yield arm.answer_static(formatter, filled, max_new_tokens, options.compile)[: len(samples)]
        finally:
            forget_compiled(arm.model)
    else:
        for formatter, samples in batches:
            yield arm.answer(formatter, samples, max_new_tokens, share_prefix)


def _continuously(
    arm: Arm, batches: Batches, max_new_tokens: int, batch_size: int, options: BackendOptions
) -> Generator[list[Answer]]:
    """Yield answers of prompts that join and leave a running batch: the next ones are encoded while it generates."""
    waiting: deque[tuple[Sequence[Sample], Generated, list[Request]]] = deque()
    running = arm.pruned.continuous(batch_size, max_new_tokens, options.cache_tokens, options.step_tokens)
    with running:
        for formatter, samples in batches:
            with torch.inference_mode():
                prompts, generated = arm.pruned.lone_prompts(**arm.place(formatter.prompt_batch(samples)))
                requests = [running.submit(prompt) for prompt in prompts]
            waiting.append((samples, generated, requests))
            while waiting and (len(waiting) >= _AHEAD or all(request.done for request in waiting[0][2])):
                yield _first(arm, waiting)
        while waiting:
            yield _first(arm, waiting)


def _first(arm: Arm, waiting: deque[tuple[Sequence[Sample], Generated, list[Request]]]) -> list[Answer]:
    """Wait for the answers to the first batch."""
    samples, generated, requests = waiting.popleft()
    return arm.answers(samples, generated, [request.result() for request in requests])
