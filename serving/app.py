"""The endpoints: chat completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from prunetune.reading import one_line
from prunetune.screen import say
from prunetune.serving.body import read_body
from prunetune.serving.errors import Refused
from prunetune.serving.job import Delta, Event, Finished
from prunetune.serving.schema import ChatRequest, read_request
from prunetune.serving.service import Answering, Service
from prunetune.serving.shapes import Reply, event, model, models

Told = TypeVar("Told")


def build_app(service: Service) -> FastAPI:
    """Return the application of one arm that is served."""
    app = FastAPI(title="prunetune", docs_url=None, redoc_url=None, openapi_url=None)
    name = service.config.served_name

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await Exchange(service, request).response()

    @app.get("/v1/models")
    async def listed() -> dict[str, Any]:
        return models(name, service.created)

    @app.get("/v1/models/{asked:path}")
    async def one(asked: str) -> Response:
        if asked != name:
            return refusal(Refused(404, "model_not_found", f"there is no model {asked!r} here; it is {name!r}"))
        return JSONResponse(model(name, service.created))

    @app.get("/health")
    @app.get("/health/live")
    async def live() -> Response:
        return _health(service.batcher.alive)

    @app.get("/health/ready")
    async def ready() -> Response:
        return _health(service.batcher.alive and not service.draining)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        said = f"{request.method} {request.url.path}: {error.detail}"
        return refusal(Refused(error.status_code, "not_found" if error.status_code == 404 else "http_error", said))

    return app


def refusal(why: Refused) -> Response:
    """Return a refused request's answer."""
    # A client that was too slow or sent too much is not read any further.
    headers = {"Connection": "close"} if why.status in (408, 413) else {}
    if why.status in (429, 503):
        headers["Retry-After"] = "1"
    return JSONResponse(why.body(), why.status, headers)


def _health(good: bool) -> Response:
    return JSONResponse({"status": "ok" if good else "unavailable"}, 200 if good else 503)


class Exchange:
    """One request and its response.

    Args:
        service: who answers.
        request: as it comes in.
    """

    def __init__(self, service: Service, request: Request) -> None:
        self.service = service
        self.request = request
        self.began = time.perf_counter()
        self.held = AsyncExitStack()  # the request's place in the queue

    async def response(self) -> Response:
        """Return the response; what is refused is refused with its status, also of streams."""
        self.service.opened(1)
        try:
            response = await self._response()
        except BaseException:  # as of a stop that waits no longer: nobody waits for the answer, and nobody may count it
            await self.close(499)
            raise
        if not isinstance(response, Stream):
            await self.close(response.status_code)
        return response

    async def _response(self) -> Response:
        try:
            self.service.check_running()
            asked = read_request(await read_body(self.request, self.service.config.limits))
            answering = await self._unless_gone(self.held.enter_async_context(self.service.answering(asked)))
            first = await self._unless_gone(answering.next())
            self.service.metrics.first.observe(time.perf_counter() - self.began)
            if asked.stream:
                return Stream(self, asked, answering, first)
            answer = first
            while not isinstance(answer, Finished):
                answer = await self._unless_gone(answering.next())
            return JSONResponse(Reply(asked.model).whole(answer))
        except Refused as why:
            return refusal(why)
        except ClientDisconnect:
            return refusal(_gone_away())
        except Exception as error:  # a bug: it is said here, and the client gets JSON as of all errors
            say(f"a request failed: {type(error).__name__}: {one_line(error)}")
            return refusal(Refused(500, "internal_error", "the server failed; its log says more"))

    async def _unless_gone(self, told: Awaitable[Told]) -> Told:
        """Return what is waited for, unless the client goes away before it comes.

        Raises:
            Refused: 499, which nobody reads.
        """
        telling, gone = asyncio.ensure_future(told), asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait((telling, gone), return_when=asyncio.FIRST_COMPLETED)
            if not telling.done():
                raise _gone_away()
            return telling.result()
        finally:
            telling.cancel()
            gone.cancel()

    async def _gone(self) -> None:
        # The body was read, so that nothing else is to come.
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    async def close(self, status: int) -> None:
        """Give the place in the queue back, and count the request."""
        await self.held.aclose()
        self.service.opened(-1)
        self.service.metrics.requests.labels(str(status)).inc()
        if status == 200:
            self.service.metrics.seconds.observe(time.perf_counter() - self.began)


class Stream(StreamingResponse):
    """An answer as it comes; a client that goes away ends it, and with it the request.

    Args:
        exchange: whose answer it is.
        asked: the request.
        answering: where events come from.
        first: the first of them, which came before the head is sent.
    """

    def __init__(self, exchange: Exchange, asked: ChatRequest, answering: Answering, first: Event) -> None:
        super().__init__(self._events(asked, answering, first), media_type="text/event-stream")
        self.exchange = exchange
        self.ended = 499

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; the request is closed whatever becomes of it, also if no event was ever asked for."""
        limits = self.exchange.service.config.limits
        try:
            # A client that reads nothing ends like one that went away, when no answer could still be on its way.
            async with asyncio.timeout(limits.answer_seconds + limits.body_seconds):
                await super().__call__(scope, receive, send)
        except (ClientDisconnect, TimeoutError):
            pass
        finally:
            await self.exchange.close(self.ended)

    async def _events(self, asked: ChatRequest, answering: Answering, first: Event) -> AsyncIterator[str]:
        reply = Reply(asked.model)
        try:
            yield reply.piece({"role": "assistant", "content": ""})
            told = first
            while not isinstance(told, Finished):
                if isinstance(told, Delta):
                    yield reply.piece({"content": told.text})
                told = await answering.next()
            yield reply.piece({}, told.reason)
            if asked.stream_options is not None and asked.stream_options.include_usage:
                yield reply.cost(told)
            self.ended = 200
            yield "data: [DONE]\n\n"
        except Refused as why:  # after its head was sent: the status can't change any more
            self.ended = why.status
            yield event(why.body())


def _gone_away() -> Refused:
    return Refused(499, "client_closed_request", "the client went away")
