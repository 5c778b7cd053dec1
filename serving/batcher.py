"""The queue, and the one thread that takes micro-batches from it and has the model answer them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence

import torch

from prunetune.configs.serving import BatchingConfig
from prunetune.errors import PrunetuneError
from prunetune.reading import one_line
from prunetune.screen import say
from prunetune.serving.backends.base import Backend, RowsRefused
from prunetune.serving.errors import Refused
from prunetune.serving.job import Failed, Job
from prunetune.serving.metrics import Metrics


class MicroBatcher:
    """Requests in the order in which they came, answered batch by batch.

    A batch is what waits when the model is free: after its first request it waits ``wait_ms`` to fill, no longer. A
    request that fails alone costs the others of its batch a second run, and never their answers.

    Args:
        backend: who answers; it is called by one thread alone.
        options: how long a batch waits, how large it is, and how many may wait.
        metrics: what is counted.
    """

    def __init__(self, backend: Backend, options: BatchingConfig, metrics: Metrics) -> None:
        self.backend = backend
        self.options = options
        self.metrics = metrics
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._failed = False
        self._thread = threading.Thread(target=self._serve, name="model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the model's thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Put a request into the queue.

        Raises:
            Refused: 429 if too many wait, 503 if the server stops or has failed.
        """
        with self._changed:
            if self._closed:
                raise Refused(503, "stopping", "the server is stopping; ask another one")
            if self._failed:
                raise _dead()
            if len(self._waiting) >= self.options.max_waiting:
                raise Refused(429, "queue_full", f"{len(self._waiting)} requests wait already; ask again later")
            self._waiting.append(job)
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Forget a request that nobody waits for: one in the queue goes at once, of a running one the row ends."""
        job.cancel()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self.metrics.waiting.set(len(self._waiting))

    def close(self) -> None:
        """Answer what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self.backend.close()

    def _serve(self) -> None:
        batch: list[Job] = []
        try:
            while batch := self._next_batch():
                for job in batch:
                    self.metrics.queued.observe(time.perf_counter() - job.began)
                self.metrics.batches.observe(len(batch))
                self._answer(batch)
                # Nothing holds a request's images until the next one comes.
                batch.clear()
                del job
        except BaseException:  # a GPU that failed, or SystemExit of a plug-in: nobody would ever be answered
            with self._changed:
                self._failed = True
                left = [*batch, *self._waiting]
                self._waiting.clear()
            for job in left:
                job.tell(Failed(_dead()))
            raise

    def _next_batch(self) -> list[Job]:
        """Return what has come in, at least one request; nothing when the server stops."""
        batch: list[Job] = []
        until = None
        with self._changed:
            while True:
                while self._waiting and len(batch) < self.options.max_batch:
                    job = self._waiting.popleft()
                    if not job.cancelled.is_set():
                        batch.append(job)
                self.metrics.waiting.set(len(self._waiting))
                if batch and until is None:
                    until = time.perf_counter() + self.options.wait_ms / 1000
                if len(batch) == self.options.max_batch or (self._closed and not self._waiting):
                    return batch
                left = None if until is None else until - time.perf_counter()
                if left is not None and left <= 0:
                    return batch
                self._changed.wait(left)

    def _answer(self, jobs: Sequence[Job]) -> None:
        """Have a batch answered; whatever happens, every request of it is told its end."""
        try:
            self.backend.run(jobs)
        except RowsRefused as refused:
            self._without(jobs, refused.rows)
        except torch.AcceleratorError as error:  # after one, a process has no GPU that computes anything
            say(f"the GPU failed: {one_line(error)}")
            raise
        # Anything else: a bug in one request's path must end neither the thread nor the other requests.
        except Exception as error:
            alone = [job for job in jobs if not job.ended and not job.told_text and not job.cancelled.is_set()]
            if len(jobs) > 1 and alone:
                for job in alone:
                    self._answer([job])
            why = refusal_of(error)
            for job in jobs:
                job.tell(Failed(why))
        for job in jobs:
            if not job.ended and job.cancelled.is_set():
                job.tell(Failed(Refused(499, "cancelled", "nobody waits for this answer")))

    def _without(self, jobs: Sequence[Job], refused: Mapping[int, Refused]) -> None:
        """Refuse some requests of a batch and answer the others."""
        for number, why in refused.items():
            jobs[number].tell(Failed(why))
        left = [job for job in jobs if not job.ended]
        if left:
            self._answer(left)


def _dead() -> Refused:
    return Refused(503, "model_stopped", "the model's thread has ended; the server's log says why. Restart it")


def refusal_of(error: Exception) -> Refused:
    """Return what a request is told of an error: ours is the request's fault, and says so; others stay inside."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, PrunetuneError):
        return Refused(400, "invalid_prompt", one_line(error))
    say(f"a request failed: {type(error).__name__}: {one_line(error)}")
    return Refused(500, "internal_error", "the model failed on this request; the server's log says more")
