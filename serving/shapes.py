"""What OpenAI's clients read: completions, their pieces, the list of models."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from prunetune.serving.job import Finished, Usage


@dataclass(frozen=True)
class Reply:
    """What all pieces of one answer share.

    Attributes:
        model: the name that was asked for.
        id: of the answer.
        created: in seconds since 1970.
    """

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Finished) -> dict[str, Any]:
        """Return a completion."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text},
            "logprobs": None,
            "finish_reason": answer.reason,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(answer.usage)}

    def piece(self, delta: dict[str, Any], reason: str | None = None) -> str:
        """Return one event of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def cost(self, answer: Finished) -> str:
        """Return the event of a stream that holds its usage."""
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage(answer.usage)})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(value: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


def usage(cost: Usage) -> dict[str, Any]:
    """Return tokens as OpenAI counts them; how many of the image's were there and kept stands beside."""
    return {
        "prompt_tokens": cost.prompt,
        "completion_tokens": cost.completion,
        "total_tokens": cost.prompt + cost.completion,
        "visual_tokens": cost.visual,
        "visual_tokens_kept": cost.kept,
    }


def models(name: str, created: int) -> dict[str, Any]:
    """Return the list of models: one."""
    return {"object": "list", "data": [model(name, created)]}


def model(name: str, created: int) -> dict[str, Any]:
    """Return one entry of it."""
    return {"id": name, "object": "model", "created": created, "owned_by": "prunetune"}
