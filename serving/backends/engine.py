"""HTTP to an engine: which model it has, and streams of answers."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from prunetune.reading import one_line, shown
from prunetune.serving.errors import Refused, ServingError
from prunetune.serving.remote import hang_up


class EngineClient:
    """An OpenAI-compatible engine.

    Args:
        url: http://HOST:PORT, with or without a path before ``/v1``.
        seconds: that a reply may take.
    """

    def __init__(self, url: str, seconds: float) -> None:
        parts = urlsplit(url)
        self.url = url
        self.seconds = seconds
        self.secure = parts.scheme == "https"
        self.host = parts.hostname or ""
        self.port = parts.port
        self.path = parts.path.rstrip("/").removesuffix("/v1")

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        return kind(self.host, self.port, timeout=self.seconds)

    def model(self, name: str | None = None) -> tuple[str, int | None]:
        """Return the engine's name of the model and its context, None if it says none.

        Raises:
            ServingError: if the engine is not there, has no such model, or several and none was named.
        """
        connection = self._connection()
        try:
            connection.request("GET", f"{self.path}/v1/models")
            found = {entry["id"]: entry for entry in json.loads(connection.getresponse().read())["data"]}
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            raise ServingError(
                f"there is no engine at {self.url} ({one_line(error)}); start it first, as `serve.sh` of "
                "`prunetune export --for vllm` does, or set vllm.url"
            ) from error
        finally:
            connection.close()
        if name is None and len(found) != 1:
            raise ServingError(f"{self.url} has the models {', '.join(found) or 'none'}; name one in vllm.model")
        if name is not None and name not in found:
            raise ServingError(f"{self.url} has no model {name!r}; it has {', '.join(found) or 'none'}")
        chosen = name or next(iter(found))
        return chosen, found[chosen].get("max_model_len")

    @contextmanager
    def stream(self, body: dict[str, Any]) -> Iterator[tuple[Iterator[dict[str, Any]], Callable[[], None]]]:
        """Ask for an answer; give its events, and what ends it from another thread.

        Raises:
            Refused: 502 if the engine is not there or refuses, with what it says.
        """
        connection = self._connection()
        try:
            try:
                content = json.dumps(body).encode()
                connection.request(
                    "POST", f"{self.path}/v1/chat/completions", content, {"Content-Type": "application/json"}
                )
                # Kept: the response closes the connection's own where nothing follows.
                line = connection.sock
                reply = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise Refused(502, "engine_unreachable", f"the engine does not answer: {one_line(error)}") from error
            if reply.status != 200:
                raise _refusal(reply.status, reply.read(10_000))
            yield _events(reply), lambda: hang_up(line)
        finally:
            connection.close()


def _events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in reply:
        text = line.decode().strip()
        if text == "data: [DONE]":
            return
        if text.startswith("data:"):
            yield json.loads(text[len("data:") :])


def _refusal(status: int, content: bytes) -> Refused:
    """Return what a client is told of an engine's refusal: it was given what was checked, so the fault is inside."""
    try:
        said = json.loads(content)
        message = said.get("error", said).get("message", "")
    except (ValueError, AttributeError):
        message = content.decode(errors="replace")
    # Cut: an engine may echo all the features.
    if status in (429, 503):
        return Refused(503, "engine_busy", f"the engine says {status}: {shown(message)}")
    return Refused(502, "engine_refused", f"the engine says {status}: {shown(message)}")
