"""Questions about images that have none: a shipped list, a file of the user's, or prompts that make a model ask."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from prunetune.data_recipes.images import IMAGE_FILES
from prunetune.data_recipes.sample import DataError, Sample, Turn

GENERAL = (
    "Describe the image in detail.",
    "Describe the image in one sentence.",
    "What are the main objects in this image?",
    "What is in the foreground, and what is in the background?",
    "Where are the objects in relation to one another?",
    "What colors stand out, and on what?",
    "How many of each kind of object are there?",
    "What text can be read in this image?",
    "What is happening in this image?",
    "Where might this picture have been taken?",
    "What is on the left side of the image?",
    "What is on the right side of the image?",
    "What is at the top of the image?",
    "What is at the bottom of the image?",
    "What is the smallest thing that can be made out?",
    "What is unusual about this image?",
)
"""What can be asked of any image. Half of it sends the model to places and small things, which pruning loses first."""

ASKING = (
    "Ask one question about the main object in this image. Reply with the question alone.",
    "Ask one question about where something is in this image. Reply with the question alone.",
    "Ask one question about a color in this image. Reply with the question alone.",
    "Ask one question about how many things of a kind are in this image. Reply with the question alone.",
    "Ask one question about a small detail of this image. Reply with the question alone.",
    "Ask one question about what is in the background of this image. Reply with the question alone.",
    "Ask one question about text or a number in this image. Reply with the question alone.",
    "Ask one question about how two things in this image relate. Reply with the question alone.",
)
"""Prompts that a model answers with a question; each asks for another kind, since greedy answers to one are one."""


def images_below(folder: str | Path) -> list[str]:
    """Return the images below a folder by their names, as paths relative to it.

    Raises:
        DataError: if it is no folder, or has none.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{folder} is not a folder; name one with images")
    found = [path for path in root.rglob("*") if path.suffix.lower() in IMAGE_FILES and path.is_file()]
    if not found:
        raise DataError(f"{folder} has no image; {', '.join(IMAGE_FILES)} are looked for")
    return sorted(path.relative_to(root).as_posix() for path in found)


def images_hash(folder: str | Path, references: Sequence[str]) -> str:
    """Return a SHA-256 of the images' names and content."""
    digest = hashlib.sha256()
    for reference in references:
        content = (Path(folder) / reference).read_bytes()
        digest.update(f"{reference}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def read_questions(file: str | Path) -> list[str]:
    """Return the questions of a text file, one a line, each once.

    Raises:
        DataError: if it can't be read, or has none.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"questions file {file} can't be read: {error}") from None
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise DataError(f"questions file {file} has no question; write one a line")
    return found


def dealt(references: Sequence[str], questions: Sequence[str], each: int, seed: int) -> Iterator[Sample]:
    """Yield each image with some of the questions; which they are depends on seed and image alone.

    Args:
        references: the images.
        questions: what may be asked.
        each: how many questions an image gets; all of them where there are fewer.
        seed: of the draw.
    """
    for reference in references:
        drawn = random.Random(f"{seed} {reference}").sample(list(questions), min(each, len(questions)))
        yield from asked_of(reference, drawn)


def asked_of(reference: str, questions: Sequence[str]) -> Iterator[Sample]:
    """Yield a sample for each question about an image."""
    for number, question in enumerate(questions, start=1):
        name = reference if number == 1 else f"{reference}#{number}"
        yield Sample(name, "custom", reference, (Turn(question, None),))


def question_in(text: str) -> str:
    """Return the question in what a model said: its first line, as far as the first question mark."""
    line = text.strip().partition("\n")[0]
    question, mark, _ = line.partition("?")
    return (question + mark).strip().strip('"').strip()


def without_repeats(questions: Sequence[str]) -> list[str]:
    """Return the questions that say something, each once, whatever its capitals."""
    found: dict[str, str] = {}
    for question in questions:
        if question:
            found.setdefault(question.casefold(), question)
    return list(found.values())
