"""A load test: clients that ask at once, and one server that answers what has come in batch by batch."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

WAIT = 0.002
"""Seconds that the server waits for a batch to fill after its first request."""
Answer = Callable[[Sequence[int]], object]
"""Answers some requests, by their numbers, in one batch."""


@dataclass(frozen=True)
class Load:
    """One round.

    Attributes:
        seconds: from the first request to the last answer.
        waits: seconds that each request waited for its answer.
        batches: requests in each batch.
    """

    seconds: float
    waits: list[float]
    batches: list[int]

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.waits) / self.seconds

    def waited(self, share: float) -> float:
        """Return the seconds that this share of the requests waited at most."""
        ranked = sorted(self.waits)
        return ranked[min(int(share * len(ranked)), len(ranked) - 1)]


@dataclass(frozen=True)
class _Request:
    number: int
    done: Future[None]


def run_load(answer: Answer, clients: int, requests: int, at_most: int) -> Load:
    """Have several clients ask until all requests are answered; each asks again when it has its answer.

    Args:
        answer: is called by one thread alone.
        clients: how many ask at once.
        requests: how many are asked, numbered from 0.
        at_most: requests that one batch takes.

    Raises:
        Exception: what ``answer`` raised, after all clients have stopped.
    """
    round_ = _Round(answer, requests, at_most)
    serving = threading.Thread(target=round_.serve, daemon=True)
    asking = [threading.Thread(target=round_.ask, daemon=True) for _ in range(clients)]
    began = time.perf_counter()
    for thread in (serving, *asking):
        thread.start()
    for thread in asking:
        thread.join()
    seconds = time.perf_counter() - began
    round_.asked.put(None)
    serving.join()
    if round_.failure is not None:
        raise round_.failure
    return Load(seconds, round_.waits, round_.batches)


class _Round:
    """What clients and server share."""

    def __init__(self, answer: Answer, requests: int, at_most: int) -> None:
        self.answer = answer
        self.at_most = at_most
        self.asked: queue.Queue[_Request | None] = queue.Queue()
        self.waits: list[float] = []
        self.batches: list[int] = []
        self.failure: Exception | None = None
        self._numbers = iter(range(requests))
        self._taking = threading.Lock()

    def ask(self) -> None:
        """Be a client, until there is nothing more to ask or something failed."""
        while self.failure is None:
            with self._taking:
                number = next(self._numbers, None)
            if number is None:
                return
            request, began = _Request(number, Future()), time.perf_counter()
            self.asked.put(request)
            request.done.result()
            self.waits.append(time.perf_counter() - began)

    def serve(self) -> None:
        """Be the server, until nobody asks any more."""
        while (batch := self._next_batch()) is not None:
            self.batches.append(len(batch))
            try:
                if self.failure is None:
                    self.answer([request.number for request in batch])
            except Exception as failure:  # raised where the round was started, and not in a thread
                self.failure = failure
            for request in batch:
                request.done.set_result(None)

    def _next_batch(self) -> list[_Request] | None:
        """Return what has come in, at least one request; None when there will be no more."""
        first = self.asked.get()
        if first is None:
            return None
        batch, until = [first], time.perf_counter() + WAIT
        while len(batch) < self.at_most:
            try:
                request = self.asked.get(timeout=max(until - time.perf_counter(), 0))
            except queue.Empty:
                break
            assert request is not None  # nobody says that it is over while a request is not answered
            batch.append(request)
        return batch
