"""Reading a request's body: a limit of bytes and of time, and JSON alone."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request

from prunetune.configs.serving import LimitsConfig
from prunetune.reading import one_line, parse_json
from prunetune.serving.errors import Refused, ServingError, bad

_DISCARDED = 4
"""Bodies up to so many times the limit are read to their end, and thrown away: a client that is cut off while it sends
sees a broken connection, and not what is wrong."""


async def read_body(request: Request, limits: LimitsConfig) -> Any:
    """Return the JSON value of a request.

    Raises:
        Refused: 413 above the limit of bytes, 415 for another type, 408 for a client that is too slow, 400 for what is
            no JSON.
    """
    try:
        content = await asyncio.wait_for(_read(request, limits), limits.body_seconds)
    except TimeoutError:
        raise Refused(408, "request_timeout", f"the request took more than {limits.body_seconds:g} s") from None
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "unsupported_media_type", f"send application/json, got {kind or 'no content-type'}")
    try:
        return parse_json(content.decode("utf-8-sig"), "the body", ServingError)
    except (UnicodeDecodeError, ServingError) as error:
        raise bad("invalid_json", one_line(error)) from None


async def _read(request: Request, limits: LimitsConfig) -> bytes:
    content, size, most = bytearray(), 0, limits.max_body
    told = request.headers.get("content-length", "0")
    if told.isdigit() and int(told) > _DISCARDED * most:
        raise _too_large(limits)
    async for piece in request.stream():
        size += len(piece)
        if size > _DISCARDED * most:  # whatever its head said
            break
        if size <= most:
            content += piece
        else:
            content.clear()
    if size > most:
        raise _too_large(limits)
    return bytes(content)


def _too_large(limits: LimitsConfig) -> Refused:
    return Refused(413, "request_too_large", f"a request has at most {limits.max_body:,} bytes; send smaller images")
