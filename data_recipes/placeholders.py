"""What stands for pictures in a prompt, and so may not stand in a text that somebody writes."""

from __future__ import annotations

from typing import Any

from prunetune.data_recipes.images import HERE
from prunetune.data_recipes.sample import DataError


def placeholders(processor: Any) -> set[str]:
    """Return what stands for images and videos in a processor's prompts, and what it writes around them."""
    found = {HERE}
    for name in dir(processor):
        if name.endswith("_token"):
            found.add(getattr(processor, name))
    return {mark for mark in found if isinstance(mark, str) and mark}


def check_question(processor: Any, question: str) -> None:
    """Check that a question of one's own is text alone.

    Raises:
        DataError: if it holds a placeholder, which would be one without its picture, or half a letter.
    """
    for mark in sorted(placeholders(processor)):
        if mark in question:
            raise DataError(f"the question holds {mark!r}, which stands for an image; leave it out")
    try:
        question.encode()
    except UnicodeEncodeError:
        raise DataError(f"the question {question!r} is not UTF-8 text; write it anew") from None
