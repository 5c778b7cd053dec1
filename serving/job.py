"""One request on its way through the server, and what is told of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prunetune.data_recipes.sample import Sample
from prunetune.serving.errors import Refused


@dataclass(frozen=True)
class Wanted:
    """What a request asks for.

    Attributes:
        longest: answer in tokens; None is the server's own limit, or what the context leaves.
        temperature: 0 takes the likeliest token.
        top_p: of sampling: the smallest set of tokens with this probability.
        seed: of sampling; None is another one each time.
        stops: texts before which the answer ends.
        stream: whether text is told as it comes.
    """

    longest: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    stream: bool = False


@dataclass(frozen=True)
class Usage:
    """What a request cost, in tokens.

    Attributes:
        prompt: tokens that the LLM read.
        completion: tokens that it wrote, the end token included.
        visual: visual tokens of the request's images.
        kept: those of them that reached the LLM.
    """

    prompt: int
    completion: int
    visual: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Delta:
    """More text of an answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """A whole answer; ``reason`` is OpenAI's: "stop" or "length"."""

    text: str
    reason: str
    usage: Usage


@dataclass(frozen=True)
class Failed:
    """The end of a request that got no answer."""

    why: Refused


Event = Delta | Finished | Failed


@dataclass(eq=False)
class Job:
    """One request.

    Attributes:
        sample: the conversation.
        opened: what its image is: an image, a dialogue, or None.
        wanted: what is asked for.
        emit: is told every event, from any thread; it must not wait.
        cancelled: set when nobody waits for the answer any more.
        stop: is called then, where somebody else is to be told as well.
        began: when it came, of ``time.perf_counter``.
        ended: whether the last event was told.
    """

    sample: Sample
    opened: Any
    wanted: Wanted
    emit: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    began: float = field(default_factory=time.perf_counter)
    stop: Callable[[], None] | None = None
    told_text: bool = False
    ended: bool = False
    _telling: threading.Lock = field(default_factory=threading.Lock)

    def tell(self, event: Event) -> None:
        """Tell an event; after the last one nothing more is told."""
        with self._telling:
            if self.ended:
                return
            self.told_text = self.told_text or isinstance(event, Delta)
            self.ended = not isinstance(event, Delta)
            self.emit(event)

    def cancel(self) -> None:
        """Say that nobody waits any more."""
        self.cancelled.set()
        stop = self.stop
        if stop is not None:
            stop()
