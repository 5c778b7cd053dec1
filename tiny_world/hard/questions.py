"""Questions of the harder tiny world: names of up to three words, relations, counts, numbers.

An object is named by as many words as it takes: every kind that ends in 2 or 3 names it by two or three attributes
none of which would do alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from prunetune.tiny_world.hard.scene import CELLS_PER_SIDE, COLUMNS, ROWS, place
from prunetune.tiny_world.scene import COLORS, SHAPES, SIZES, Number, Scene, Shape

COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The words of the questions themselves; general prompts of text-conditioned pruners add a few.
_SCAFFOLD = (
    "describe the . what color is shape ? a object objects or there how many are have where number shown first last "
    "digit of yes no left right above below in picture and , nothing with an on it to this image all text"
)
PER_SCENE = 10
_DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class HardQuestion:
    """A question with its one correct answer.

    Attributes:
        source: vg, gqa or textvqa.
        kind: what it asks for, a key of ``KINDS``.
        text: the question.
        answer: one to three words.
        named: the things the question names, in order: 0 to n - 1 are the scene's shapes, n and n + 1 the digits.
        read: for each word of the answer the things it is read from; nothing where it says that there is none.
    """

    source: str
    kind: str
    text: str
    answer: str
    named: tuple[int, ...] = ()
    read: tuple[tuple[int, ...], ...] = ()


Poser = Callable[[Scene, np.random.Generator], HardQuestion | None]
"""Poses a question of one kind, or returns None where the scene has none."""


def hard_vocabulary() -> list[str]:
    """Return every word of the harder world once: questions, answers and a few words of general prompts."""
    words = [*_SCAFFOLD.split(), *COLORS, *SHAPES, *SIZES, *ROWS, *COLUMNS, *COUNTS, *"0123456789"]
    return list(dict.fromkeys(words))


def ask_hard(scene: Scene) -> list[HardQuestion]:
    """Pose the scene's ten questions: two descriptions, up to two about the number, the rest of other kinds.

    The same scene gets the same questions on every machine.
    """
    rng = np.random.default_rng([scene.seed, 2])
    posed = []
    for index in rng.permutation(len(scene.shapes))[:2].tolist():
        posed.append(_describe_shape(scene, index))
    if scene.number is not None:
        for kind in rng.permutation(TEXT_KINDS)[:2].tolist():
            posed.append(_made(scene, kind, rng))
    while len(posed) < PER_SCENE:
        for kind in rng.permutation(GQA_KINDS).tolist():
            question = KINDS[kind](scene, rng)
            if question is not None and len(posed) < PER_SCENE:
                posed.append(question)
    return posed


def drill_hard(scene: Scene, count: int, weights: dict[str, float], rng: np.random.Generator) -> list[HardQuestion]:
    """Pose ``count`` questions of kinds drawn by weight (1 for those not given); training uses them."""
    chance = np.array([weights.get(kind, 1.0) for kind in KINDS])
    kinds = list(KINDS)
    posed: list[HardQuestion] = []
    while len(posed) < count:
        for index in rng.choice(len(kinds), 2 * count, p=chance / chance.sum()).tolist():
            question = KINDS[kinds[index]](scene, rng)
            if question is not None and len(posed) < count:
                posed.append(question)
    return posed


def _made(scene: Scene, kind: str, rng: np.random.Generator) -> HardQuestion:
    question = KINDS[kind](scene, rng)
    assert question is not None  # asked only where there is a number
    return question


def _attributes(shape: Shape) -> dict[str, str]:
    return {"size": shape.size, "color": shape.color, "shape": shape.shape}


def named_alone(scene: Scene, cues: tuple[str, ...]) -> list[int]:
    """Return the shapes that these attributes together tell from all others, and no part of them does."""
    alone = []
    for index, shape in enumerate(scene.shapes):
        if _sharing(scene, shape, cues) > 1:
            continue
        parts = combinations(cues, len(cues) - 1)
        if len(cues) == 1 or all(_sharing(scene, shape, part) > 1 for part in parts):
            alone.append(index)
    return alone


def _sharing(scene: Scene, shape: Shape, cues: tuple[str, ...]) -> int:
    """Return how many shapes look like this one in the attributes ``cues``, itself included."""
    mine = _attributes(shape)
    same = 0
    for other in scene.shapes:
        looks = _attributes(other)
        same += all(looks[cue] == mine[cue] for cue in cues)
    return same


def _name(shape: Shape, cues: tuple[str, ...]) -> str:
    """Return "small red ring", or "small red object" where the form is not among the attributes."""
    looks = _attributes(shape)
    words = [looks[cue] for cue in ("size", "color", "shape") if cue in cues]
    if "shape" not in cues:
        words.append("object")
    return " ".join(words)


def _pick(options: list[int], rng: np.random.Generator) -> int | None:
    if not options:
        return None
    return options[int(rng.integers(len(options)))]


def _describe(scene: Scene, rng: np.random.Generator) -> HardQuestion:
    return _describe_shape(scene, int(rng.integers(len(scene.shapes))))


def _describe_shape(scene: Scene, index: int) -> HardQuestion:
    shape = scene.shapes[index]
    answer = f"{shape.size} {shape.color} {shape.shape}"
    return HardQuestion("vg", "describe", f"describe the {place(shape.cell)} .", answer, (index,), ((index,),) * 3)


def _lookup(kind: str, asked: str, cues: tuple[str, ...]) -> Poser:
    """Return what poses "what color is the small ring ?" and the like about an object that ``cues`` name."""
    texts = {
        "color": "what color is the {} ?",
        "shape": "what shape is the {} ?",
        "size": "is the {} large or small ?",
        "where": "where is the {} ?",
    }

    def pose(scene: Scene, rng: np.random.Generator) -> HardQuestion | None:
        index = _pick(named_alone(scene, cues), rng)
        if index is None:
            return None
        shape = scene.shapes[index]
        answer = place(shape.cell) if asked == "where" else _attributes(shape)[asked]
        read = ((index,),) * len(answer.split())
        return HardQuestion("gqa", kind, texts[asked].format(_name(shape, cues)), answer, (index,), read)

    return pose


def _exist(scene: Scene, rng: np.random.Generator) -> HardQuestion | None:
    """Ask for a colour and a form that are both there: on one object, or never together; half and half."""
    together = sorted({(shape.color, shape.shape) for shape in scene.shapes})
    colors = sorted({color for color, _ in together})
    forms = sorted({form for _, form in together})
    apart = [(color, form) for color in colors for form in forms if (color, form) not in together]
    answer = "yes" if rng.random() < 0.5 else "no"  # drawn first, so that neither answer is the better guess
    options = together if answer == "yes" else apart
    if not options:
        return None
    color, form = options[int(rng.integers(len(options)))]
    found = tuple(i for i, shape in enumerate(scene.shapes) if (shape.color, shape.shape) == (color, form))
    return HardQuestion("gqa", "exist2", f"is there a {color} {form} ?", answer, found, (found,))


def _count_of(kind: str, cue: str, known: tuple[str, ...], text: str) -> Poser:
    """Return what poses a count by colour or by form, of 0 to 4; every count the scene has is equally likely."""

    def pose(scene: Scene, rng: np.random.Generator) -> HardQuestion | None:
        by_count: dict[int, list[str]] = {}
        inked = scene.number.color if scene.number is not None else ""
        for value in known:
            count = sum(_attributes(shape)[cue] == value for shape in scene.shapes)
            # The number is no object, but its colour is there to be seen: it is asked for neither way.
            if count <= 4 and value != inked:
                by_count.setdefault(count, []).append(value)
        counts = sorted(by_count)
        count = counts[int(rng.integers(len(counts)))]
        value = by_count[count][int(rng.integers(len(by_count[count])))]
        counted = tuple(i for i, shape in enumerate(scene.shapes) if _attributes(shape)[cue] == value)
        return HardQuestion("gqa", kind, text.format(value), COUNTS[count], (), (counted,))

    return pose


def _count_all(scene: Scene, rng: np.random.Generator) -> HardQuestion:
    every = tuple(range(len(scene.shapes)))
    return HardQuestion("gqa", "count_all", "how many objects are there ?", COUNTS[len(every)], (), (every,))


def _by_two(scene: Scene) -> list[int]:
    """Return the shapes that colour and form name, whether or not one of them would do."""
    return [i for i, shape in enumerate(scene.shapes) if _sharing(scene, shape, ("color", "shape")) == 1]


def _relation(scene: Scene, rng: np.random.Generator) -> HardQuestion | None:
    """Ask whether one object is left of, or above, another; half of the answers are yes."""
    answer = "yes" if rng.random() < 0.5 else "no"
    axis = int(rng.integers(2))
    options = []
    for one, other in combinations(_by_two(scene), 2):
        at = divmod(scene.shapes[one].cell, CELLS_PER_SIDE)[axis]
        to = divmod(scene.shapes[other].cell, CELLS_PER_SIDE)[axis]
        if at != to:
            options.append((one, other) if (at < to) == (answer == "yes") else (other, one))
    if not options:
        return None
    first, second = options[int(rng.integers(len(options)))]
    names = [_name(scene.shapes[index], ("color", "shape")) for index in (first, second)]
    text = f"is the {names[0]} {('above', 'left of')[axis]} the {names[1]} ?"
    return HardQuestion("gqa", "rel", text, answer, (first, second), ((first, second),))


def _next(scene: Scene, rng: np.random.Generator) -> HardQuestion | None:
    """Ask for colour and form of the object in the cell beside a named one."""
    at = {shape.cell: index for index, shape in enumerate(scene.shapes)}
    options = []
    for index in _by_two(scene):
        row, column = divmod(scene.shapes[index].cell, CELLS_PER_SIDE)
        for word, (down, right) in _DIRECTIONS.items():
            inside = 0 <= row + down < CELLS_PER_SIDE and 0 <= column + right < CELLS_PER_SIDE
            beside = at.get((row + down) * CELLS_PER_SIDE + column + right)
            if inside and beside is not None:
                options.append((index, word, beside))
    if not options:
        return None
    index, word, beside = options[int(rng.integers(len(options)))]
    neighbour = scene.shapes[beside]
    text = f"what is {word} the {_name(scene.shapes[index], ('color', 'shape'))} ?"
    answer = f"{neighbour.color} {neighbour.shape}"
    return HardQuestion("gqa", "next", text, answer, (index,), ((beside,), (beside,)))


def _about_number(kind: str, text: str, answer: Callable[[Number], str], reads: tuple[tuple[int, ...], ...]) -> Poser:
    """Return what poses a question about the number; ``reads`` says which digits each word is read from."""

    def pose(scene: Scene, rng: np.random.Generator) -> HardQuestion | None:
        if scene.number is None:
            return None
        things = tuple(tuple(len(scene.shapes) + digit for digit in word) for word in reads)
        return HardQuestion("textvqa", kind, text, answer(scene.number), (), things)

    return pose


KINDS: dict[str, Poser] = {
    "describe": _describe,
    "color1": _lookup("color1", "color", ("shape",)),
    "shape1": _lookup("shape1", "shape", ("color",)),
    "where1": _lookup("where1", "where", ("color",)),
    "size2": _lookup("size2", "size", ("color", "shape")),
    "where2": _lookup("where2", "where", ("color", "shape")),
    "color2": _lookup("color2", "color", ("size", "shape")),
    "shape2": _lookup("shape2", "shape", ("size", "color")),
    "where3": _lookup("where3", "where", ("size", "color", "shape")),
    "exist2": _exist,
    "count_color": _count_of("count_color", "color", COLORS, "how many objects are {} ?"),
    "count_shape": _count_of("count_shape", "shape", SHAPES, "how many objects have the shape {} ?"),
    "count_all": _count_all,
    "rel": _relation,
    "next": _next,
    "number": _about_number("number", "what number is shown ?", lambda n: f"{n.digits[0]} {n.digits[1]}", ((0,), (1,))),
    "first": _about_number("first", "what is the first digit ?", lambda n: str(n.digits[0]), ((0,),)),
    "last": _about_number("last", "what is the last digit ?", lambda n: str(n.digits[1]), ((1,),)),
    "ink": _about_number("ink", "what color is the number ?", lambda n: n.color, ((0, 1),)),
}
TEXT_KINDS = ("number", "first", "last", "ink")
GQA_KINDS = tuple(kind for kind in KINDS if kind not in ("describe", *TEXT_KINDS))
