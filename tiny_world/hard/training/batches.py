"""Batches of the harder world as tensors: pixels, patch labels, words of patches, captions, questions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prunetune.tiny_world.hard.questions import HardQuestion
from prunetune.tiny_world.hard.scene import (
    CELLS_PER_SIDE,
    COLUMNS,
    PATCHES,
    ROWS,
    Patches,
    object_masks,
    patches_of,
    place,
    render_hard,
    sample_hard_scene,
)
from prunetune.tiny_world.scene import COLORS, SHAPES, SIZES, Scene
from prunetune.tiny_world.training.model import EOS, PAD

# How many classes each label has; class 0 is the background, and a number is a form of its own. Rows and columns are
# labels because features that do not hold them cannot be asked "where".
PATCH_LABELS = {
    "form": len(SHAPES) + 2,
    "color": len(COLORS) + 1,
    "size": len(SIZES) + 1,
    "digit": 11,
    "order": 3,
    "row": len(ROWS) + 1,
    "column": len(COLUMNS) + 1,
    "middle": 2,
}
ANCHOR_WORD = "object"
"""The word that the middle patch of every object carries besides its own: what is counted."""
IGNORE = -100


@dataclass
class HardBatch:
    """B scenes: ``labels[name]`` (B, 144), ``words`` (B, 144, V) 1 where a patch shows the word, else 0."""

    scenes: list[Scene]
    patches: list[Patches]
    labels: dict[str, Tensor]
    words: Tensor
    pixels: Tensor | None


@dataclass
class HardQuestions:
    """Q questions per scene, padded to T: ids and answer labels (B, Q, T), and where each answer word is read.

    ``places`` (M, 3) are scene, question and position of the words that are supervised; ``sets`` (3, M, 145) says for
    two heads of the first reading layer and for the second reading layer which of `<s>` and the patches to look at
    (all zero where nothing is asked); ``even`` (M,) asks for equal shares of attention, as counting needs.
    """

    ids: Tensor
    labels: Tensor
    places: Tensor
    sets: Tensor
    even: Tensor


class HardWords:
    """The ids of words, looked up without the tokenizer's overhead."""

    def __init__(self, vocabulary: dict[str, int]) -> None:
        self.ids = vocabulary
        self.prefix = torch.tensor([vocabulary["<s>"], vocabulary["USER"], vocabulary[":"]])
        self._ending = [vocabulary["ASSISTANT"], vocabulary[":"]]

    def apart(self) -> Tensor:
        """Return the matrix (V, V) that takes from each word's vector the mean of its class."""
        matrix = torch.eye(len(self.ids))
        for known in (SIZES, COLORS, SHAPES, ROWS, COLUMNS, tuple("0123456789"), ("first", "last")):
            ids = torch.tensor(self.encode(" ".join(known)))
            matrix[ids[:, None], ids] -= 1 / len(ids)
        return matrix

    def encode(self, text: str) -> list[int]:
        """Return the ids of words that stand apart."""
        return [self.ids[word] for word in text.split()]

    def prompt(self, question: str) -> list[int]:
        """Return the ids of ``question ASSISTANT:``."""
        return self.encode(question) + self._ending


def hard_batch(seeds: range, words: HardWords, pixels: bool = True) -> HardBatch:
    """Draw scenes and say for every patch what it shows; without ``pixels`` nothing is rendered."""
    scenes = [sample_hard_scene(seed) for seed in seeds]
    labels = {name: np.zeros((len(scenes), PATCHES), dtype=np.int64) for name in PATCH_LABELS}
    shown = np.zeros((len(scenes), PATCHES, len(words.ids)), dtype=np.float32)
    images, patches = [], []
    for row, scene in enumerate(scenes):
        masks = object_masks(scene)
        if pixels:
            images.append(render_hard(scene, masks))
        of_scene = patches_of(scene, masks)
        patches.append(of_scene)
        for mine, thing in zip(of_scene.owned, _things(scene), strict=True):
            for name, value in thing.labels.items():
                labels[name][row, mine] = value
            shown[row][np.ix_(mine, words.encode(thing.words))] = 1
        labels["middle"][row, of_scene.anchors] = 1
        shown[row, of_scene.anchors, words.ids[ANCHOR_WORD]] = 1
    drawn = None
    if pixels:
        drawn = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    targets = {name: torch.from_numpy(values) for name, values in labels.items()}
    return HardBatch(scenes, patches, targets, torch.from_numpy(shown), drawn)


@dataclass
class _Thing:
    """A drawn thing: its class under each patch label, and the words for it."""

    labels: dict[str, int]
    words: str


def _things(scene: Scene) -> list[_Thing]:
    """Return what is drawn, in the order of the masks; class 0 of every label is the background."""
    things = []
    for shape in scene.shapes:
        labels = {
            "form": 1 + SHAPES.index(shape.shape),
            "color": 1 + COLORS.index(shape.color),
            "size": 1 + SIZES.index(shape.size),
            **_place_labels(shape.cell),
        }
        things.append(_Thing(labels, f"{shape.size} {shape.color} {shape.shape} {place(shape.cell)}"))
    if scene.number is None:
        return things
    for order, (word, digit) in enumerate(zip(("first", "last"), scene.number.digits, strict=True)):
        labels = {
            "form": 1 + len(SHAPES),
            "color": 1 + COLORS.index(scene.number.color),
            "digit": 1 + digit,
            "order": 1 + order,
            **_place_labels(scene.number.cell),
        }
        things.append(_Thing(labels, f"number {word} {digit} {scene.number.color} {place(scene.number.cell)}"))
    return things


def _place_labels(cell: int) -> dict[str, int]:
    row, column = divmod(cell, CELLS_PER_SIDE)
    return {"row": 1 + row, "column": 1 + column}


def question_tensors(batch: HardBatch, questions: list[list[HardQuestion]], words: HardWords) -> HardQuestions:
    """Return equally many questions per scene as ``question ASSISTANT: answer</s>`` with loss on the answer only."""
    rows = []
    for asked in questions:
        for question in asked:
            rows.append((words.prompt(question.text), [*words.encode(question.answer), EOS]))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = np.full((len(rows), longest), PAD)
    labels = np.full((len(rows), longest), IGNORE)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = prompt + answer
        labels[row, len(prompt) : end] = answer
    shape = (len(questions), len(questions[0]), longest)
    places, sets, even = _reading(batch, questions, labels.reshape(shape))
    return HardQuestions(
        torch.from_numpy(ids).view(shape), torch.from_numpy(labels).view(shape), places, sets, torch.tensor(even)
    )


def _reading(
    batch: HardBatch, questions: list[list[HardQuestion]], labels: np.ndarray
) -> tuple[Tensor, Tensor, list[bool]]:
    """Return the supervised places, what each reader should look at there, and whether in equal shares."""
    places: list[tuple[int, int, int]] = []
    even: list[bool] = []
    sets: list[np.ndarray] = []
    for scene, asked in enumerate(questions):
        patches = batch.patches[scene]
        for number, question in enumerate(asked):
            first = int((labels[scene, number] != IGNORE).argmax()) - 1  # the position that predicts the first word
            for word in range(len(question.read)):
                places.append((scene, number, first + word))
                even.append(question.kind.startswith("count"))
                sets.append(_looked_at(question, word, patches))
    return torch.tensor(places), torch.from_numpy(np.stack(sets, axis=1)), even


def _looked_at(question: HardQuestion, word: int, patches: Patches) -> np.ndarray:
    """Return (3, 145): for two heads of the first reading layer and for the second, `<s>` first, then the patches."""
    sets = np.zeros((3, 1 + PATCHES), dtype=np.float32)
    read = list(question.read[word])
    if question.kind.startswith("count"):
        sets[:2, 0] = 1  # `<s>` takes part, so that its share tells how many others there are
        sets[:2, 1 + patches.anchors[read]] = 1
    elif question.kind == "rel":
        for head, thing in enumerate(question.named):
            sets[head, 1:] = patches.owned[thing]
    elif not read:
        sets[:2, 0] = 1  # "no such thing" has a place to look at too
    elif question.kind == "next":
        sets[:2, 1:] = patches.owned[question.named[0]]
        sets[2, 1:] = patches.owned[read].any(0)
    else:
        sets[:2, 1:] = patches.owned[read].any(0)
    return sets


def hard_captions(scenes: list[Scene], rng: np.random.Generator) -> tuple[list[str], list[str], Tensor]:
    """Return a caption of 3 to 6 things and one phrase per scene, and which phrase is true of which scene."""
    full, phrases = [], []
    for scene in scenes:
        parts = []
        for shape in scene.shapes:
            parts.append(f"{shape.size} {shape.color} {shape.shape} {place(shape.cell)}")
        if scene.number is not None:
            first, last = scene.number.digits
            parts.append(f"{scene.number.color} number {first} {last}")
        # Shuffled, so that a position in the text says nothing of the image.
        order = rng.permutation(len(parts))[: int(rng.integers(3, 7))]
        full.append(" , ".join(parts[index] for index in order))
        shape = scene.shapes[rng.integers(len(scene.shapes))]
        if rng.random() < 0.3 and scene.number is not None:
            phrases.append("number")
        else:
            phrases.append(f"{shape.color} {shape.shape}")
    true = [[_holds(phrase, scene) for scene in scenes] for phrase in phrases]
    return full, phrases, torch.tensor(true)


def _holds(phrase: str, scene: Scene) -> bool:
    if phrase == "number":
        return scene.number is not None
    return phrase in [f"{shape.color} {shape.shape}" for shape in scene.shapes]
