"""Requests of the chat completions endpoint: what is understood, and what is refused by name."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prunetune.names import nearest
from prunetune.reading import shown
from prunetune.serving.errors import Refused, bad

IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
"""Fields that change no answer: clients send them, and nothing is done with them."""

REFUSED: dict[str, tuple[Any, ...]] = {
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "top_k": (None, -1, 0),
    "min_p": (None, 0),
    "repetition_penalty": (None, 1),
}
"""Fields of OpenAI's and vLLM's that are not there, and the values that ask for nothing."""


class Part(BaseModel):
    """One part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Part):
    """Text."""

    type: Literal["text"]
    text: str


class ImageUrl(Part):
    """Where an image is; ``detail`` is not looked at."""

    url: str
    detail: str | None = None


class ImagePart(Part):
    """An image. ``uuid`` is vLLM's: it is taken and never handed on, since it would stand for the image's content."""

    type: Literal["image_url"]
    image_url: ImageUrl
    uuid: Any = None


class Message(BaseModel):
    """One message: of the system, the user or the assistant."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart | ImagePart]
    name: str | None = None


class StreamOptions(BaseModel):
    """What a stream holds beside text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request. Numbers may be written with or without a point."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None

    @property
    def longest(self) -> int | None:
        """The answer's longest length in tokens, under either of its names."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts before which an answer ends."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def read_request(body: Any) -> ChatRequest:
    """Return a request.

    Args:
        body: the JSON value.

    Raises:
        Refused: 400, naming the field: an unknown one, one of a wrong type or range, or one that is not there.
    """
    if not isinstance(body, dict):
        raise bad("invalid_json", f"the body is a JSON object, got {type(body).__name__}")
    values = {}
    for name, value in body.items():
        if name in REFUSED:
            _check_asks_for_nothing(name, value)
        elif name not in IGNORED:
            values[name] = value
    for name in values:
        if name not in ChatRequest.model_fields:
            known = nearest(name, ChatRequest.model_fields)
            raise bad("unknown_field", f"there is no field {name!r}{known}; leave it out", name)
    try:
        request = ChatRequest.model_validate(values)
    except ValidationError as error:
        raise _explained(error) from None
    _check(request)
    return request


def _check_asks_for_nothing(name: str, value: Any) -> None:
    # 0 == False, and yet only one of the two is a number of logprobs.
    if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in REFUSED[name]):
        raise bad("unsupported_field", f"{name} is not offered here, got {shown(value)}; leave it out", name)


def _check(request: ChatRequest) -> None:
    """Check what types alone don't say."""
    if request.n not in (None, 1):
        raise bad("unsupported_value", f"n is 1: one answer a request; got {request.n}", "n")
    if request.messages[-1].role != "user":
        raise bad("invalid_value", "the last message is the user's, which the model answers", "messages")
    if len(request.stops) > 16 or any(not stop or len(stop) > 256 for stop in request.stops):
        raise bad("invalid_value", "stop is at most 16 texts of 1 to 256 letters", "stop")
    if request.stream_options is not None and not request.stream:
        raise bad("invalid_value", "stream_options belongs to stream: true", "stream_options")
    for number, message in enumerate(request.messages):
        if not message.content:
            raise bad("invalid_value", f"messages.{number}.content is empty", f"messages.{number}.content")
        has_image = isinstance(message.content, list) and any(part.type == "image_url" for part in message.content)
        if has_image and message.role != "user":
            raise bad("invalid_value", f"images stand in the user's messages alone, got {message.role}",
                      f"messages.{number}")  # fmt: skip


def _explained(error: ValidationError) -> Refused:
    """Return the first of a request's errors in one line."""
    # Of a union each member complains; the one that got furthest is the one that was meant.
    detail = max(error.errors(), key=lambda found: len(found["loc"]))
    if detail["type"] == "literal_error" and detail["loc"][-1] == "type":
        where = ".".join(str(step) for step in detail["loc"] if not isinstance(step, str) or step.islower())
        return bad(
            "invalid_value", f"{where}: parts are of type text or image_url, got {shown(detail['input'])}", where
        )
    where = ".".join(str(step) for step in detail["loc"] if not isinstance(step, str) or step.islower())
    if detail["type"] == "missing":
        return bad("missing_field", f"{where} is missing", where)
    said = detail["msg"][0].lower() + detail["msg"][1:]
    return bad("invalid_value", f"{where}: {said}, got {shown(detail['input'])}", where)
