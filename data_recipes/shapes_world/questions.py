"""Eight questions per scene: two VG-like, four GQA-like, two TextVQA-like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_recipes.shapes_world.scene import COLORS, COLUMNS, ROWS, SHAPES, SIZES, Number, Scene, Shape, place

COUNTS = ("zero", "one", "two", "three", "four", "five")
_SCAFFOLD = (
    "describe the . what color is shape ? a object or there how many shapes are where number shown first last digit "
    "of yes no in picture and , nothing with an on it to this image all text"
)


@dataclass(frozen=True)
class Question:
    """A question with its one correct answer; ``source`` is vg, gqa or textvqa, ``kind`` is what it asks for."""

    source: str
    kind: str
    text: str
    answer: str


def vocabulary() -> list[str]:
    """Return every word of the world once: questions, answers and a few words of general prompts."""
    words = [*_SCAFFOLD.split(), *COLORS, *SHAPES, *SIZES, *ROWS, *COLUMNS, *COUNTS, *"0123456789"]
    return list(dict.fromkeys(words))


def ask(scene: Scene) -> list[Question]:
    """Pose the scene's eight questions; the same scene gets the same questions on every machine."""
    rng = np.random.default_rng([scene.seed, 2])
    vg = [_describe(scene, index) for index in rng.permutation(len(scene.shapes))[:2]]
    text_kinds = rng.permutation(list(_NUMBER))[:2].tolist() if scene.number else []
    gqa_wanted = 6 - len(text_kinds)
    gqa: list[Question] = []
    for kind in rng.permutation(list(_GQA)).tolist():
        question = _GQA[kind](scene, rng)
        if question is not None and len(gqa) < gqa_wanted:
            gqa.append(question)
    while len(gqa) < gqa_wanted:  # a scene without repeats may lack some kinds; existence can always be asked
        gqa.append(_exist(scene, rng))
    return [*vg, *gqa, *(_NUMBER[kind](scene.number) for kind in text_kinds if scene.number is not None)]


def drill(scene: Scene) -> list[Question]:
    """Pose twelve questions that exercise every way of looking something up; the tiny VLM's own training uses them.

    Among the eight questions of :func:`ask`, few can be answered only by finding a *shape*, and a small model that
    has learned to find things by colour never learns the rest. Here a third of the questions has to be answered so.
    """
    rng = np.random.default_rng([scene.seed, 5])
    counts = Counter(shape.shape for shape in scene.shapes)
    alone = [shape for shape in scene.shapes if counts[shape.shape] == 1]
    questions = [Question("gqa", "color", f"what color is the {s.shape} ?", s.color) for s in alone[:3]]
    for kind in ("where", "where", "exist", "exist", "size", "shape", "count"):
        question = _GQA[kind](scene, rng)
        questions += [question] if question is not None else []
    if scene.number is not None:
        questions += [_NUMBER[kind](scene.number) for kind in rng.permutation(list(_NUMBER))[:2].tolist()]
    order = rng.permutation(len(scene.shapes)).tolist()
    while len(questions) < 12:
        questions.append(_describe(scene, order[len(questions) % len(order)]))
    return questions[:12]


def _describe(scene: Scene, index: int) -> Question:
    shape = scene.shapes[index]
    return Question(
        "vg", "describe", f"describe the {' '.join(place(shape.cell))} .", f"{shape.size} {shape.color} {shape.shape}"
    )


def _unique(scene: Scene, field: str, rng: np.random.Generator) -> Shape | None:
    """Return a random shape whose ``field`` no other shape of the scene shares, or None."""
    counts = Counter(getattr(shape, field) for shape in scene.shapes)
    single = [shape for shape in scene.shapes if counts[getattr(shape, field)] == 1]
    return single[rng.integers(len(single))] if single else None


def _color(scene: Scene, rng: np.random.Generator) -> Question | None:
    shape = _unique(scene, "shape", rng)
    return None if shape is None else Question("gqa", "color", f"what color is the {shape.shape} ?", shape.color)


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    shape = _unique(scene, "color", rng)
    return None if shape is None else Question("gqa", "shape", f"what shape is the {shape.color} object ?", shape.shape)


def _size(scene: Scene, rng: np.random.Generator) -> Question:
    shape = scene.shapes[rng.integers(len(scene.shapes))]
    return Question("gqa", "size", f"is the {shape.color} {shape.shape} large or small ?", shape.size)


def _where(scene: Scene, rng: np.random.Generator) -> Question:
    shape = scene.shapes[rng.integers(len(scene.shapes))]
    return Question("gqa", "where", f"where is the {shape.color} {shape.shape} ?", " ".join(place(shape.cell)))


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("gqa", "count", "how many shapes are there ?", COUNTS[len(scene.shapes)])


def _exist(scene: Scene, rng: np.random.Generator) -> Question:
    """Ask for a pair that is there, or for one whose colour and shape are both there, on different objects."""
    pairs = {(shape.color, shape.shape) for shape in scene.shapes}
    swapped = sorted({(a.color, b.shape) for a in scene.shapes for b in scene.shapes} - pairs)
    if rng.random() < 0.5 or not swapped:
        color, shape = sorted(pairs)[rng.integers(len(pairs))]
        return Question("gqa", "exist", f"is there a {color} {shape} ?", "yes")
    color, shape = swapped[rng.integers(len(swapped))]
    return Question("gqa", "exist", f"is there a {color} {shape} ?", "no")


_GQA: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "color": _color, "shape": _shape, "size": _size, "where": _where, "count": _count, "exist": _exist,
}  # fmt: skip
_NUMBER: dict[str, Callable[[Number], Question]] = {
    "number": lambda n: Question("textvqa", "number", "what number is shown ?", f"{n.digits[0]} {n.digits[1]}"),
    "first": lambda n: Question("textvqa", "first", "what is the first digit ?", str(n.digits[0])),
    "last": lambda n: Question("textvqa", "last", "what is the last digit ?", str(n.digits[1])),
    "ink": lambda n: Question("textvqa", "ink", "what color is the number ?", n.color),
}
