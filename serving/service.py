"""From a request that was read to the events of its answer."""

from __future__ import annotations

import asyncio
import copy
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from prunetune.configs import ServeConfig
from prunetune.data_recipes.placeholders import placeholders
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
        began: when it came, of ``time.perf_counter``.
    """

    job: Job
    events: asyncio.Queue[Event]
    seconds: float
    began: float

    async def next(self) -> Event:
        """Return the next event.

        Raises:
            Refused: if there is no answer: what the model's side said, or 504 when it takes too long.
        """
        left = self.seconds - (time.perf_counter() - self.began)
        try:
            event = await asyncio.wait_for(self.events.get(), max(left, 0.001))
        except TimeoutError:
            raise _too_late(self.seconds) from None
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
        running = config.batching.max_batch if config.engine == "embedded" else config.vllm.in_flight
        self._most = config.batching.max_waiting + config.batching.max_batch + running
        self._pixels = 0
        self._open: set[Job] = set()
        self._numbers = itertools.count()
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="images")
        processor: Any = arm.processor
        # A copy of its own: the model's thread changes padding on the other one while it is read here.
        self._tokenizer = copy.deepcopy(processor.tokenizer)
        self._tokenizing = threading.Lock()
        self._longest_token = max(len(token) for token in self._tokenizer.get_vocab())
        self._marks = reserved(processor, arm.template)
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
        began, seconds = time.perf_counter(), self.config.limits.answer_seconds
        try:
            # Others' images may have to be decoded, or fetched, before.
            async with asyncio.timeout(seconds):
                job, events, pixels = await self._job(request)
        except TimeoutError:
            raise _too_late(seconds) from None
        with self._room_for(pixels):
            self.batcher.submit(job)
            self._open.add(job)
            try:
                yield Answering(job, events, seconds, began)
            finally:
                self._open.discard(job)
                if not job.ended:
                    self.batcher.cancel(job)

    @contextmanager
    def _room_for(self, pixels: int) -> Iterator[None]:
        """Count decoded pixels as long as their request is there; the event loop's thread alone calls it.

        Raises:
            Refused: 429 if there are too many with them.
        """
        most = self.config.limits.max_waiting_pixels
        if self._pixels and self._pixels + pixels > most:
            raise Refused(429, "queue_full", f"images of {self._pixels:,} pixels wait already; ask again later")
        self._pixels += pixels
        try:
            yield
        finally:
            self._pixels -= pixels

    def check_running(self) -> None:
        """Refuse requests while the server stops, 503, and what can't be answered soon before it is read, 429."""
        if self.draining:
            raise Refused(503, "stopping", "the server is stopping; ask another one")
        if self.in_flight > self._most:
            raise Refused(429, "queue_full", f"{self.in_flight - 1} requests are in flight already; ask again later")

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
            for mark in self._marks:
                if mark in text:
                    said = f"a text holds {mark!r}, which stands for an image or the end of a turn; leave it out"
                    raise bad("invalid_value", said, "messages")

    async def _job(self, request: ChatRequest) -> tuple[Job, asyncio.Queue[Event], int]:
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

        pixels = sum(image.width * image.height for image in images)
        return Job(sample, opened, wanted, emit), events, pixels

    def _opened(self, request: ChatRequest) -> list[Any]:
        """Return a request's images, after its text was found to fit the context."""
        tokens = self._tokens(texts(request))
        if tokens > self._context:
            raise bad(
                "context_length_exceeded",
                f"the texts have {tokens} tokens or more, and the model's context {self._context}; shorten them",
                "messages",
            )
        return [self.reader.open(url, where) for url, where in image_urls(request)]

    def _tokens(self, told: Sequence[str]) -> int:
        """Return how many tokens texts have, or a lower bound once it is above the context."""
        # Millions of letters take seconds to tokenize and hundreds of MB, for as long as nobody else's are counted.
        tokens = sum(len(text) for text in told) // self._longest_token
        if tokens > self._context:
            return tokens
        tokens = 0
        with self._tokenizing:
            for text in told:
                tokens += len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
                if tokens > self._context:
                    break
        return tokens

    def give_up(self) -> None:
        """Refuse what has no answer yet: 503. The event loop's thread alone calls it."""
        why = Refused(503, "stopping", "the server stopped before the answer was there; ask another one")
        for job in list(self._open):
            job.tell(Failed(why))
            self.batcher.cancel(job)

    def close(self) -> None:
        """Answer what waits, and end all threads."""
        self.draining = True
        self.batcher.close()
        self._decoders.shutdown()


def reserved(processor: Any, template: str) -> list[str]:
    """Return what no text of a request may hold, since the tokenizer would read it as more than text.

    Args:
        processor: whose placeholders stand for images and videos: one without its picture fails a whole batch.
        template: of chats, whose special tokens begin and end turns: a text that holds them would forge others.
    """
    tokenizer = processor.tokenizer
    found = placeholders(processor) | {tokenizer.bos_token, tokenizer.eos_token}
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    found.update(token for token in [*tokenizer.all_special_tokens, *added] if token in template)
    return sorted(mark for mark in found if mark)


def _too_late(seconds: float) -> Refused:
    return Refused(504, "answer_timeout", f"no answer within {seconds:g} s")
