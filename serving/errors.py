"""What a request is refused with: a status, a code that programs read, and one line that people read."""

from __future__ import annotations

from typing import Any

from prunetune.errors import PrunetuneError


class ServingError(PrunetuneError):
    """A server that can't start: the message says what to do."""


class Refused(Exception):
    """One request that is not answered.

    Attributes:
        status: of HTTP.
        code: a word for programs, such as ``image_too_large``.
        message: what was wrong, what was expected and what to do, in one line.
        param: the field of the request that it is about, if it is about one.
    """

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param

    def body(self) -> dict[str, Any]:
        """Return the JSON that OpenAI's clients read."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(code: str, message: str, param: str | None = None) -> Refused:
    """Return what a request of a wrong shape or content is refused with: 400."""
    return Refused(400, code, message, param)
