"""Questions about drawn pictures, whose answers two paths must agree on before anybody is answered."""

from __future__ import annotations

import base64
import io
import json
import queue
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from prunetune.data_recipes.sample import Sample, Turn
from prunetune.reading import one_line
from prunetune.serving.backends.base import Backend
from prunetune.serving.errors import ServingError
from prunetune.serving.job import Event, Failed, Finished, Job, Wanted

FORMAT = 1
TOKENS = 8
"""Of each answer: what two engines round differently decides more of a long one."""
FILE = "reference.json"
_ASKED = (
    "What color is the shape?",
    "What shape is in the picture?",
    "Describe the picture.",
    "How many shapes are there?",
)
_COLORS = ("red", "blue", "green", "yellow", "purple", "orange", "white", "black")
_SIZE = 336


@dataclass(frozen=True)
class Reference:
    """One question about one picture; ``answer`` is None where none was recorded."""

    image: Image.Image
    question: str
    answer: str | None = None


def drawn(count: int) -> list[Reference]:
    """Return questions about as many pictures, which are always the same."""
    found = []
    for number in range(count):
        image = Image.new("RGB", (_SIZE, _SIZE), _COLORS[(number * 3 + 5) % len(_COLORS)])
        pen = ImageDraw.Draw(image)
        color = _COLORS[number % len(_COLORS)]
        box = (40 + 12 * (number % 7), 60, 200 + 9 * (number % 11), 240)
        if number % 2:
            pen.ellipse(box, fill=color)
        else:
            pen.rectangle(box, fill=color)
        found.append(Reference(image, _ASKED[number % len(_ASKED)]))
    return found


def answers(backend: Backend, references: Sequence[Reference]) -> list[Finished]:
    """Return what a backend answers, greedily, in one batch.

    Raises:
        Refused: if one of them has no answer.
    """
    collected = []
    for number, reference in enumerate(references):
        name = f"reference {number}"
        collector = _Collector()
        sample = Sample(name, "reference", name, (Turn(reference.question, None),))
        collected.append((Job(sample, reference.image, Wanted(longest=TOKENS), collector), collector))
    backend.run([job for job, _ in collected])
    return [collector.finished() for _, collector in collected]


class _Collector:
    """Waits for the end of one answer."""

    def __init__(self) -> None:
        self.ends: queue.Queue[Event] = queue.Queue()

    def __call__(self, event: Event) -> None:
        self.ends.put(event)

    def finished(self) -> Finished:
        event = self.ends.get(timeout=600)
        if isinstance(event, Failed):
            raise event.why
        assert isinstance(event, Finished)  # nobody asked for a stream
        return event


def write_references(folder: Path, references: Sequence[Reference], said: Sequence[str], pruning: Any) -> Path:
    """Write questions, pictures and answers, and return the file."""
    rows = []
    for reference, answer in zip(references, said, strict=True):
        file = io.BytesIO()
        reference.image.save(file, "PNG")
        image = base64.b64encode(file.getvalue()).decode()
        rows.append({"question": reference.question, "answer": answer, "image": image})
    path = folder / FILE
    path.write_text(json.dumps({"format": FORMAT, "pruning": pruning, "tokens": TOKENS, "questions": rows}, indent=1))
    return path


def read_references(path: str | Path) -> list[Reference]:
    """Return what :func:`write_references` wrote.

    Raises:
        ServingError: if the file can't be read, or holds something else.
    """
    found = []
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
        if held["format"] != FORMAT:
            raise ValueError(f"format {held['format']} is not {FORMAT}")
        for row in held["questions"]:
            image = Image.open(io.BytesIO(base64.b64decode(row["image"]))).convert("RGB")
            found.append(Reference(image, row["question"], row["answer"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServingError(
            f"{path} holds no reference questions ({one_line(error)}); `prunetune export --for vllm` writes them"
        ) from error
    return found
