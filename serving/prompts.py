"""From a request to a sample as `prunetune evaluate` has it, or to a conversation where a sample can't say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from prunetune.data_recipes.images import Album, Dialogue
from prunetune.data_recipes.sample import DataError, Sample, Turn
from prunetune.serving.schema import ChatRequest, ImagePart, Message

ROLES = {"developer": "system"}
"""Roles that templates call otherwise."""


def image_urls(request: ChatRequest) -> list[tuple[str, str]]:
    """Return the URL of every image in reading order, with its field."""
    found = []
    for number, message in enumerate(request.messages):
        for place, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if isinstance(part, ImagePart):
                found.append((part.image_url.url, f"messages.{number}.content.{place}.image_url"))
    return found


def texts(request: ChatRequest) -> list[str]:
    """Return every text of a request."""
    found = []
    for message in request.messages:
        if isinstance(message.content, str):
            found.append(message.content)
        else:
            found += [part.text for part in message.content if not isinstance(part, ImagePart)]
    return found


def read_prompt(request: ChatRequest, images: list[Image.Image], name: str) -> tuple[Sample, Any]:
    """Return a request's sample, and what opening its image gives: an image, a dialogue, or None.

    Users and assistants in turn, with at most one image and that before the first question, are what evaluations ask:
    they become such a sample. Everything else goes to the chat template as it is written.

    Args:
        request: as it was read.
        images: its images, in reading order.
        name: the sample's, which is the name of its image as well.
    """
    turns = _turns(request.messages)
    if turns is not None and len(images) <= 1:
        return Sample(name, "request", name if images else None, turns), images[0] if images else None
    messages = []
    for message in request.messages:
        messages.append({"role": ROLES.get(message.role, message.role), "content": _parts(message)})
    asked = tuple(Turn(_text(message), None) for message in request.messages if message.role == "user")
    return Sample(name, "request", name, asked), Dialogue(tuple(images), tuple(messages))


def _turns(messages: list[Message]) -> tuple[Turn, ...] | None:
    """Return questions and answers; None where messages are no such turns, or an image is not where it is in these."""
    turns = []
    for number in range(0, len(messages), 2):
        question, *answer = messages[number : number + 2]
        if question.role != "user" or any(message.role != "assistant" for message in answer):
            return None
        parts = _parts(question)
        if number == 0 and parts[0]["type"] == "image":
            parts = parts[1:]
        if len(parts) != 1 or parts[0]["type"] != "text":
            return None
        turns.append(Turn(parts[0]["text"], _text(answer[0]) if answer else None))
    return tuple(turns)


def _parts(message: Message) -> list[dict[str, Any]]:
    if isinstance(message.content, str):
        return [{"type": "text", "text": message.content}]
    parts: list[dict[str, Any]] = []
    for part in message.content:
        parts.append({"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text})
    return parts


def _text(message: Message) -> str:
    return "".join(part.get("text", "") for part in _parts(message))


class OpenedImages:
    """What a batch's requests brought along, by the names of their samples."""

    def __init__(self, opened: Mapping[str, Image.Image | Album]) -> None:
        self.opened = opened

    def exists(self, reference: str) -> bool:
        """Return whether a request of this name is in the batch."""
        return reference in self.opened

    def open(self, reference: str, sample_id: str) -> Any:
        """Return the image, or the conversation with its images."""
        if reference not in self.opened:
            raise DataError(f"sample {sample_id!r}: there is no image {reference!r} in this batch")
        return self.opened[reference]
