"""Start one server: load the arm, check the engine, open the port, stop without losing an answer."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any

import uvicorn

from prunetune.configs import ServeConfig
from prunetune.models.arm import Arm
from prunetune.reading import one_line
from prunetune.screen import say
from prunetune.serving.app import build_app
from prunetune.serving.backends.base import Backend
from prunetune.serving.backends.embedded import Embedded
from prunetune.serving.backends.vllm import VllmEmbeds
from prunetune.serving.errors import ServingError
from prunetune.serving.heads import heads_within
from prunetune.serving.preflight import check_same_answers
from prunetune.serving.references import answers, drawn, read_references
from prunetune.serving.service import Service


def serve(config: ServeConfig, arm: Arm | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        config: the server's.
        arm: one that is loaded already; None loads it.

    Raises:
        ServingError: if it can't be served like this, the engine answers otherwise, or the port is taken.
    """
    listening = listen(config)  # before minutes of loading
    if arm is None:
        arm = Arm.load(config.model, config.pruning, config.adapter, config.device)
    backend = backend_of(config, arm)
    warm_up(backend)
    server = Server(Service(config, arm, backend))
    address = f"http://{config.host}:{listening.getsockname()[1]}/v1"
    print(f"serving {config.served_name} on {address} ({config.engine})", flush=True)  # who started it may read a pipe
    try:
        server.run(sockets=[listening])
    except OSError as error:  # two servers may have waited for one port while they loaded
        server.service.close()
        raise _taken(config, error) from None


def listen(config: ServeConfig) -> socket.socket:
    """Return a socket on the port that was asked for; nobody is accepted yet.

    Raises:
        ServingError: if it is taken.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # Named, or asyncio leaves out TCP_NODELAY, and every answer to an open connection waits 40 ms.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((config.host, config.port))
    except OSError as error:
        found.close()
        raise _taken(config, error) from None
    return found


def _taken(config: ServeConfig, error: OSError) -> ServingError:
    return ServingError(f"{config.host}:{config.port} can't be listened on ({one_line(error)}); set port")


def warm_up(backend: Backend) -> None:
    """Answer a question before the port opens: the first one takes longer, and a model that can't answer says so here.

    Raises:
        ServingError: if there is no answer.
    """
    try:
        answers(backend, drawn(1))
    except Exception as error:  # whatever it is, every request would meet it
        raise ServingError(f"the model can't answer a first question: {one_line(error)}") from error


def backend_of(config: ServeConfig, arm: Arm) -> Backend:
    """Return who answers; an engine is asked the reference questions first.

    Raises:
        ServingError: as :func:`serve`.
    """
    here = Embedded(arm, config.limits)
    if config.engine == "embedded":
        return here
    options = config.vllm
    engine = VllmEmbeds(arm, config.limits, options)
    references = drawn(options.questions) if options.references is None else read_references(options.references)
    if references and options.questions:
        try:
            say(check_same_answers(here, engine, references[: options.questions], config.model.dtype == "float32"))
        except ServingError:
            engine.close()
            raise
    if not options.keep_llm:
        let_go_of_llm(arm)
    return engine


def let_go_of_llm(arm: Arm) -> None:
    """Free the weights of the LLM's layers, which run elsewhere; its embeddings stay, since methods read them."""
    layers: Any = arm.pruned.family.llm(arm.model).layers
    layers.to("meta")


class Server(uvicorn.Server):
    """uvicorn, which on a first signal refuses new requests with 503 and ends when those in flight are answered."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._ends_by: float | None = None
        config = uvicorn.Config(
            build_app(service),
            http=heads_within(service.config.limits.body_seconds),
            log_level="warning",
            timeout_graceful_shutdown=5,
            timeout_keep_alive=15,
            h11_max_incomplete_event_size=65536,
            server_header=False,
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; a second signal stops at once."""
        if self.service.draining or sig not in (signal.SIGTERM, signal.SIGINT):
            self.should_exit = True
            return
        self.drain()

    def drain(self) -> None:
        """Refuse new requests from now on, and end after the others."""
        self._ends_by = time.monotonic() + self.service.config.grace
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end; uvicorn asks ten times a second."""
        if self._ends_by is not None and (self.service.in_flight == 0 or time.monotonic() > self._ends_by):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End connections, then the model's thread."""
        left = self.service.in_flight
        self.service.give_up()  # nothing is left, or the stop waits no longer
        await super().shutdown(sockets)
        if left:
            print(f"stopped with {left} requests unanswered after {self.service.config.grace:g} s", file=sys.stderr)
        await asyncio.get_running_loop().run_in_executor(None, self.service.close)
