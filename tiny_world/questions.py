"""Eight questions per scene: two describe a place, four ask about shapes, two read the number.

They imitate the parts of PrismPrune's recalibration data, Visual Genome, GQA and TextVQA, and are called otherwise:
no number of this world is one of those benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from prunetune.tiny_world.scene import COLORS, PLACES, SHAPES, SIZES, Number, Scene, Shape

COUNTS = ("zero", "one", "two", "three", "four", "five")
# The words of the questions themselves; general prompts of text-conditioned pruners add a few.
_SCAFFOLD = (
    "describe the . what color is shape ? a object or there how many shapes are where number shown first last digit "
    "of yes no in picture and , nothing with an on it to this image all text"
)


@dataclass(frozen=True)
class Question:
    """A question with its one correct answer; ``source`` is describe, ask or read, ``kind`` is what it asks for."""

    source: str
    kind: str
    text: str
    answer: str


def vocabulary() -> list[str]:
    """Return every word of the world once: questions, answers and a few words of general prompts."""
    words = [*_SCAFFOLD.split(), *COLORS, *SHAPES, *SIZES, *PLACES, *COUNTS, *"0123456789"]
    return list(dict.fromkeys(words))


def ask(scene: Scene) -> list[Question]:
    """Pose the scene's eight questions; the same scene gets the same questions on every machine."""
    rng = np.random.default_rng([scene.seed, 2])
    questions = []
    for index in rng.permutation(len(scene.shapes))[:2]:
        questions.append(_describe(scene, index))
    about_number = []
    if scene.number is not None:
        for kind in rng.permutation(list(_NUMBER))[:2].tolist():
            about_number.append(_NUMBER[kind](scene.number))
    wanted = 8 - len(about_number)
    for kind in rng.permutation(list(_GQA)).tolist():
        # Asked also when there are enough: each draws from the generator, and the questions are part of the tiny
        # VLM's and of every measurement's definition.
        question = _GQA[kind](scene, rng)
        if question is not None and len(questions) < wanted:
            questions.append(question)
    while len(questions) < wanted:  # a scene without repeats may lack some kinds; existence can always be asked
        questions.append(_exist(scene, rng))
    return questions + about_number


def drill(scene: Scene) -> list[Question]:
    """Pose twelve questions that exercise every way of looking something up; the tiny VLM's own training uses them.

    Among the eight questions of :func:`ask`, few can be answered only by finding a *shape*, and a small model that
    has learned to find things by colour is slow to learn the rest.
    """
    rng = np.random.default_rng([scene.seed, 5])
    posed = []
    for kind in ("color", "color", "shape", "size", "where", "exist", "count"):
        question = _GQA[kind](scene, rng)
        if question is not None:
            posed.append(question)
    if scene.number is not None:
        for kind in rng.permutation(list(_NUMBER))[:3].tolist():
            posed.append(_NUMBER[kind](scene.number))
    # Filled up with descriptions: batches hold equally many questions per scene.
    order = rng.permutation(len(scene.shapes)).tolist()
    while len(posed) < 12:
        posed.append(_describe(scene, order[len(posed) % len(order)]))
    return posed


def _describe(scene: Scene, index: int) -> Question:
    shape = scene.shapes[index]
    answer = f"{shape.size} {shape.color} {shape.shape}"
    return Question("describe", "describe", f"describe the {PLACES[shape.cell]} .", answer)


def _by_shape(scene: Scene, rng: np.random.Generator) -> Shape | None:
    """Return a random object whose form no other has, or None."""
    forms = [shape.shape for shape in scene.shapes]
    alone = [shape for shape in scene.shapes if forms.count(shape.shape) == 1]
    return _pick(alone, rng)


def _by_color(scene: Scene, rng: np.random.Generator) -> Shape | None:
    """Return a random object whose colour no other object and no number has, or None."""
    inks = [shape.color for shape in scene.shapes]
    if scene.number is not None:
        inks.append(scene.number.color)
    alone = [shape for shape in scene.shapes if inks.count(shape.color) == 1]
    return _pick(alone, rng)


def _pick(shapes: list[Shape], rng: np.random.Generator) -> Shape | None:
    if not shapes:
        return None
    return shapes[rng.integers(len(shapes))]


def _named(scene: Scene, rng: np.random.Generator) -> tuple[Shape, str] | None:
    """Return an object with a name that is its own: "circle" or "red object"."""
    by_shape, by_color = _by_shape(scene, rng), _by_color(scene, rng)
    names = []
    if by_shape is not None:
        names.append((by_shape, by_shape.shape))
    if by_color is not None:
        names.append((by_color, f"{by_color.color} object"))
    if not names:
        return None
    return names[rng.integers(len(names))]


def _color(scene: Scene, rng: np.random.Generator) -> Question | None:
    shape = _by_shape(scene, rng)
    if shape is None:
        return None
    return Question("ask", "color", f"what color is the {shape.shape} ?", shape.color)


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    shape = _by_color(scene, rng)
    if shape is None:
        return None
    return Question("ask", "shape", f"what shape is the {shape.color} object ?", shape.shape)


def _size(scene: Scene, rng: np.random.Generator) -> Question | None:
    named = _named(scene, rng)
    if named is None:
        return None
    shape, name = named
    return Question("ask", "size", f"is the {name} large or small ?", shape.size)


def _where(scene: Scene, rng: np.random.Generator) -> Question | None:
    named = _named(scene, rng)
    if named is None:
        return None
    shape, name = named
    return Question("ask", "where", f"where is the {name} ?", PLACES[shape.cell])


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("ask", "count", "how many shapes are there ?", COUNTS[len(scene.shapes)])


def _exist(scene: Scene, rng: np.random.Generator) -> Question:
    """Ask for a form or a colour that is there, or for one that is nowhere in the image, half and half."""
    answer = "yes" if rng.random() < 0.5 else "no"  # drawn first, so that neither answer is the better guess
    if rng.random() < 0.5:
        known: tuple[str, ...] = SHAPES
        thing = ""
        there = {shape.shape for shape in scene.shapes}
        seen = there
    else:
        known = COLORS
        thing = " object"
        there = {shape.color for shape in scene.shapes}
        # A number is no object, but its colour is there to be seen: a colour that only it has is asked neither way.
        seen = there | ({scene.number.color} if scene.number is not None else set())
    choices = sorted(there)
    if answer == "no":
        choices = [name for name in known if name not in seen]
    name = choices[rng.integers(len(choices))]
    return Question("ask", "exist", f"is there a {name}{thing} ?", answer)


def _number(number: Number) -> Question:
    first, last = number.digits
    return Question("read", "number", "what number is shown ?", f"{first} {last}")


def _first(number: Number) -> Question:
    return Question("read", "first", "what is the first digit ?", str(number.digits[0]))


def _last(number: Number) -> Question:
    return Question("read", "last", "what is the last digit ?", str(number.digits[1]))


def _ink(number: Number) -> Question:
    return Question("read", "ink", "what color is the number ?", number.color)


_GQA: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "color": _color,
    "shape": _shape,
    "size": _size,
    "where": _where,
    "count": _count,
    "exist": _exist,
}
_NUMBER: dict[str, Callable[[Number], Question]] = {
    "number": _number,
    "first": _first,
    "last": _last,
    "ink": _ink,
}
