"""From an answer's tokens to its text, whole or as it comes; both give the same text."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from prunetune.serving.job import Delta, Finished, Job, Usage

_BROKEN = "\ufffd"
"""What a decoder writes for a letter of which not all bytes are there yet."""


class AnswerText:
    """One answer as its tokens come.

    Args:
        job: whose answer it is.
        tokenizer: of the model.
        ends: ids of end tokens.
        longest: in tokens.
        usage: what the prompt cost.
    """

    def __init__(self, job: Job, tokenizer: Any, ends: Collection[int], longest: int, usage: Usage) -> None:
        self.job = job
        self.tokenizer = tokenizer
        self.ends = ends
        self.longest = longest
        self.usage = usage
        self.tokens: list[int] = []
        self.told = ""
        # A tokenizer that mends spaces between words may still change the last one.
        self.holds_word = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))

    def add(self, token: int) -> bool:
        """Take the next token and return whether the answer has ended."""
        if self.job.ended:
            return True
        if self.job.cancelled.is_set():
            return True
        self.tokens.append(token)
        if token in self.ends:
            return self._finish("stop")
        wanted = self.job.wanted
        if wanted.stops and self._stop_at(self._text()) is not None:
            return self._finish("stop")
        if len(self.tokens) >= self.longest:
            return self._finish("length")
        if wanted.stream:
            self._tell(self._stable(self._text()))
        return False

    def _text(self) -> str:
        # The very text of `Arm.answer`: without special tokens, and stripped.
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True).strip()

    def _stop_at(self, text: str) -> int | None:
        """Return where the first of the stops begins."""
        found = [text.find(stop) for stop in self.job.wanted.stops]
        return min((at for at in found if at >= 0), default=None)

    def _stable(self, text: str) -> str:
        """Return as much of a text as later tokens can't change: no half letter, no beginning of a stop."""
        text = text.rstrip(_BROKEN)
        if self.holds_word:
            text = " ".join(text.split(" ")[:-1])
        hold = 0
        for stop in self.job.wanted.stops:
            for length in range(min(len(stop) - 1, len(text)), hold, -1):
                if text.endswith(stop[:length]):
                    hold = length
                    break
        return text[: len(text) - hold].rstrip()  # spaces before an end go with it

    def _tell(self, text: str) -> None:
        if len(text) > len(self.told) and text.startswith(self.told):
            self.job.tell(Delta(text[len(self.told) :]))
            self.told = text

    def _finish(self, reason: str) -> bool:
        text = self._text()
        at = self._stop_at(text)
        if at is not None:
            text, reason = text[:at].rstrip(), "stop"
        if self.job.wanted.stream:
            self._tell(text)
        usage = Usage(self.usage.prompt, len(self.tokens), self.usage.visual, self.usage.kept)
        self.job.tell(Finished(text, reason, usage))
        return True
