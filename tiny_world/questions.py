"""Eight questions per scene: two VG-like, four GQA-like, two TextVQA-like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from prunetune.tiny_world.scene import COLORS, PLACES, SHAPES, SIZES, Number, Scene, Shape

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
    words = [*_SCAFFOLD.split(), *COLORS, *SHAPES, *SIZES, *PLACES, *COUNTS, *"0123456789"]
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
    has learned to find things by colour is slow to learn the rest.
    """
    rng = np.random.default_rng([scene.seed, 5])
    questions = [_GQA[kind](scene, rng) for kind in ("color", "color", "shape", "size", "where", "exist", "count")]
    posed = [question for question in questions if question is not None]
    if scene.number is not None:
        posed += [_NUMBER[kind](scene.number) for kind in rng.permutation(list(_NUMBER))[:3].tolist()]
    order = rng.permutation(len(scene.shapes)).tolist()
    while len(posed) < 12:
        posed.append(_describe(scene, order[len(posed) % len(order)]))
    return posed


def _describe(scene: Scene, index: int) -> Question:
    shape = scene.shapes[index]
    return Question(
        "vg", "describe", f"describe the {PLACES[shape.cell]} .", f"{shape.size} {shape.color} {shape.shape}"
    )


def _by_shape(scene: Scene, rng: np.random.Generator) -> Shape | None:
    """Return a random object whose form no other has, or None."""
    return _pick([s for s in scene.shapes if sum(o.shape == s.shape for o in scene.shapes) == 1], rng)


def _by_color(scene: Scene, rng: np.random.Generator) -> Shape | None:
    """Return a random object whose colour no other object and no number has, or None."""
    inks = [s.color for s in scene.shapes] + ([scene.number.color] if scene.number is not None else [])
    return _pick([s for s in scene.shapes if inks.count(s.color) == 1], rng)


def _pick(shapes: list[Shape], rng: np.random.Generator) -> Shape | None:
    return shapes[rng.integers(len(shapes))] if shapes else None


def _named(scene: Scene, rng: np.random.Generator) -> tuple[Shape, str] | None:
    """Return an object with a name that is its own: "circle" or "red object"."""
    by_shape, by_color = _by_shape(scene, rng), _by_color(scene, rng)
    names = [
        (s, name)
        for s, name in ((by_shape, by_shape and by_shape.shape), (by_color, by_color and f"{by_color.color} object"))
        if s and name
    ]
    return names[rng.integers(len(names))] if names else None


def _color(scene: Scene, rng: np.random.Generator) -> Question | None:
    shape = _by_shape(scene, rng)
    return None if shape is None else Question("gqa", "color", f"what color is the {shape.shape} ?", shape.color)


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    shape = _by_color(scene, rng)
    return None if shape is None else Question("gqa", "shape", f"what shape is the {shape.color} object ?", shape.shape)


def _size(scene: Scene, rng: np.random.Generator) -> Question | None:
    named = _named(scene, rng)
    return None if named is None else Question("gqa", "size", f"is the {named[1]} large or small ?", named[0].size)


def _where(scene: Scene, rng: np.random.Generator) -> Question | None:
    named = _named(scene, rng)
    return None if named is None else Question("gqa", "where", f"where is the {named[1]} ?", PLACES[named[0].cell])


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("gqa", "count", "how many shapes are there ?", COUNTS[len(scene.shapes)])


def _exist(scene: Scene, rng: np.random.Generator) -> Question:
    """Ask for a form or a colour that is there, or for one that is nowhere in the picture, half and half."""
    forms = {s.shape for s in scene.shapes}
    colors = {s.color for s in scene.shapes}
    seen = colors | ({scene.number.color} if scene.number is not None else set())
    answer = "yes" if rng.random() < 0.5 else "no"
    if rng.random() < 0.5:
        choices = sorted(forms) if answer == "yes" else [s for s in SHAPES if s not in forms]
        return Question("gqa", "exist", f"is there a {choices[rng.integers(len(choices))]} ?", answer)
    choices = sorted(colors) if answer == "yes" else [c for c in COLORS if c not in seen]
    return Question("gqa", "exist", f"is there a {choices[rng.integers(len(choices))]} object ?", answer)


_GQA: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "color": _color, "shape": _shape, "size": _size, "where": _where, "count": _count, "exist": _exist,
}  # fmt: skip
_NUMBER: dict[str, Callable[[Number], Question]] = {
    "number": lambda n: Question("textvqa", "number", "what number is shown ?", f"{n.digits[0]} {n.digits[1]}"),
    "first": lambda n: Question("textvqa", "first", "what is the first digit ?", str(n.digits[0])),
    "last": lambda n: Question("textvqa", "last", "what is the last digit ?", str(n.digits[1])),
    "ink": lambda n: Question("textvqa", "ink", "what color is the number ?", n.color),
}
