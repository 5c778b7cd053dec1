"""From a request that was read to the events of its answer."""

from __future__ import annotations

import asyncio
import copy
import itertools
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from prunetune.configs import ServeConfig
from prunetune.models.arm import Arm
from prunetune.serving.backends.base import Backend
from prunetune.serving.batcher import MicroBatcher
from prunetune.serving.errors import Refused, bad
from prunetune.serving.images import ImageReader
from prunetune.serving.job import Event, Failed, Finished, Job, Wanted
from prunetune.serving.metrics import Metrics
from prunetune.serving.prompts import image_urls, read_prompt, texts
from prunetune.serving.schema import ChatRequest

DECODERS = 2
"""Threads that decode images, beside the one of the model."""


@dataclass(eq=False)
class Answering:
    """A request on its way.

    Attributes:
        job: in the queue, or in a batch.
        events: what was told of it.
        seconds: until it is given up.
        metrics: of the server.
    """

    job: Job
    events: asyncio.Queue[Event]
    seconds: float
    metrics: Metrics

    async def next(self) -> Event:
        """Return the next event.

        Raises:
            Refused: if there is no answer: what the model's side said, or 504 when it takes too long.
        """
        left = self.seconds - (time.perf_counter() - self.job.began)
        try:
            event = await asyncio.wait_for(self.events.get(), max(left, 0.001))
        except TimeoutError:
            raise Refused(504, "answer_timeout", f"no answer within {self.seconds:g} s") from None
        if isinstance(event, Failed):
            raise event.why
        return event


class Service:
    """One arm that is served: its queue, its limits and what it counts.

    Args:
        config: of the server.
        arm: what is served.
        backend: who answers.
    """

    def __init__(self, config: ServeConfig, arm: Arm, backend: Backend) -> None:
        self.config = config
        self.metrics = Metrics()
        self.batcher = MicroBatcher(backend, config.batching, self.metrics)
        self.reader = ImageReader(config.limits)
        self.created = int(time.time())
        self.draining = False
        self.in_flight = 0
        self._numbers = itertools.count()
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="images")
        processor: Any = arm.processor
        # A copy of its own: the model's thread changes padding on the other one while it is read here.
        self._tokenizer = copy.deepcopy(processor.tokenizer)
        self._tokenizing = threading.Lock()
        self._marks = [mark for mark in (getattr(processor, "image_token", None), "\ufffc") if mark]
        self._has_system = "system" in arm.template
        self._context: int = arm.model.config.get_text_config().max_position_embeddings

    def opened(self, by: int) -> None:
        """Count requests that are not answered yet; the event loop's thread alone calls it."""
        self.in_flight += by
        self.metrics.in_flight.set(self.in_flight)

    @asynccontextmanager
    async def answering(self, request: ChatRequest) -> AsyncIterator[Answering]:
        """While open, a request is on its way; it is cancelled when this closes.

        Raises:
            Refused: with the status that fits.
        """
        self.check(request)
        job, events = await self._job(request)
        self.batcher.submit(job)
        try:
            yield Answering(job, events, self.config.limits.answer_seconds, self.metrics)
        finally:
            if not job.ended:
                self.batcher.cancel(job)

    def check_running(self) -> None:
        """Refuse requests while the server stops: 503."""
        if self.draining:
            raise Refused(503, "stopping", "the server is stopping; ask another one")

    def check(self, request: ChatRequest) -> None:
        """Refuse what can be told before anything is decoded."""
        if request.model != self.config.served_name:
            name = self.config.served_name
            raise Refused(404, "model_not_found", f"there is no model {request.model!r} here; it is {name!r}", "model")
        images = len(image_urls(request))
        if images > self.config.limits.max_images:
            most = self.config.limits.max_images
            raise bad("too_many_images", f"a request has at most {most} images, got {images}", "messages")
        if not self._has_system and any(message.role in ("system", "developer") for message in request.messages):
            raise bad("unsupported_value", "this model's chat template has no system messages; say it as the user",
                      "messages")  # fmt: skip
        for text in texts(request):
            if any(mark in text for mark in self._marks):
                raise bad("invalid_value", f"a text holds {self._marks[0]!r}, which stands for an image", "messages")

    async def _job(self, request: ChatRequest) -> tuple[Job, asyncio.Queue[Event]]:
        loop = asyncio.get_running_loop()
        images = await loop.run_in_executor(self._decoders, self._opened, request)
        sample, opened = read_prompt(request, images, f"request {next(self._numbers)}")
        temperature = self.config.temperature if request.temperature is None else request.temperature
        wanted = Wanted(
            longest=request.longest,
            temperature=temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            stops=request.stops,
            stream=request.stream,
        )
        events: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            # Counted here and not where it is sent: what was computed was computed, whoever still listens.
            if isinstance(event, Finished):
                self.metrics.count(event.usage)
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        return Job(sample, opened, wanted, emit), events

    def _opened(self, request: ChatRequest) -> list[Any]:
        """Return a request's images, after its text was found to fit the context."""
        with self._tokenizing:
            tokens = 0
            for text in texts(request):
                tokens += len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if tokens > self._context:
            raise bad(
                "context_length_exceeded",
                f"the texts have {tokens} tokens, and the model's context {self._context}; shorten them",
                "messages",
            )
        return [self.reader.open(url, where) for url, where in image_urls(request)]

    def close(self) -> None:
        """Answer what waits, and end all threads."""
        self.draining = True
        self.batcher.close()
        self._decoders.shutdown()
