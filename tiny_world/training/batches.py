"""Batches of the tiny world as tensors: pixels, patch labels, captions, and eight questions in one row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from prunetune.tiny_world import Question, Scene, render, sample_scene
from prunetune.tiny_world.scene import COLORS, PLACES, SHAPES, SIZES, patch_cover
from prunetune.tiny_world.training.model import EOS, PAD

VISIBLE = 0.08  # a patch shows a thing from this share of its pixels on
# How many classes each label has; class 0 is the background, and a number is a form of its own.
PATCH_LABELS = {
    "form": len(SHAPES) + 2,
    "color": len(COLORS) + 1,
    "size": len(SIZES) + 1,
    "digit": 11,
}
IGNORE = -100


@dataclass
class SceneBatch:
    """B scenes: ``labels[name]`` is (B, 144), ``words`` (B, 144, V) is uniform over the words of what a patch shows."""

    pixels: Tensor
    labels: dict[str, Tensor]
    words: Tensor
    scenes: list[Scene]


@dataclass
class QuestionBatch:
    """Q questions per scene, padded to T: ids and answer labels, both (B, Q, T); ``prefix`` (P,) precedes the image."""

    prefix: Tensor
    ids: Tensor
    labels: Tensor


def scene_batch(seeds: range, tokenizer: PreTrainedTokenizerFast) -> SceneBatch:
    """Draw scenes and say for every patch what it shows."""
    scenes = [sample_scene(seed) for seed in seeds]
    images = np.stack([render(scene) for scene in scenes])  # (B, 84, 84, 3)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    labels = {name: np.zeros((len(scenes), 144), dtype=np.int64) for name in PATCH_LABELS}
    words = np.zeros((len(scenes), 144, len(tokenizer)), dtype=np.float32)
    index = tokenizer.get_vocab()
    for row, scene in enumerate(scenes):
        cover = patch_cover(scene)  # (things, 144)
        owner = cover.argmax(0)  # a patch that shows two things is the one's that covers more of it
        seen = cover.max(0) > VISIBLE
        for number, thing in enumerate(_things(scene)):
            mine = seen & (owner == number)
            for name, value in thing.labels.items():
                labels[name][row, mine] = value
            ids = [index[word] for word in thing.words]
            words[row][np.ix_(mine, ids)] = 1 / len(ids)
    targets = {name: torch.from_numpy(values) for name, values in labels.items()}
    return SceneBatch(pixels, targets, torch.from_numpy(words), scenes)


@dataclass
class _Thing:
    """A drawn thing: its class under each patch label, and the words for it."""

    labels: dict[str, int]
    words: list[str]


def _things(scene: Scene) -> list[_Thing]:
    """Return what is drawn in the order of ``patch_cover``; class 0 of every label is the background."""
    things = []
    for shape in scene.shapes:
        labels = {
            "form": 1 + SHAPES.index(shape.shape),
            "color": 1 + COLORS.index(shape.color),
            "size": 1 + SIZES.index(shape.size),
        }
        words = [shape.size, shape.color, shape.shape, PLACES[shape.cell]]
        things.append(_Thing(labels, words))
    if scene.number is not None:
        for order, digit in zip(("first", "last"), scene.number.digits, strict=True):
            labels = {
                "form": 1 + len(SHAPES),
                "color": 1 + COLORS.index(scene.number.color),
                "digit": 1 + digit,
            }
            words = ["number", order, str(digit), scene.number.color]
            things.append(_Thing(labels, words))
    return things


def question_batch(questions: list[list[Question]], tokenizer: PreTrainedTokenizerFast) -> QuestionBatch:
    """Return equally many questions per scene as ``question ASSISTANT: answer</s>`` with loss on the answer only."""
    ids, labels = [], []
    for asked in questions:
        for question in asked:
            prompt = tokenizer.encode(f"{question.text} ASSISTANT:", add_special_tokens=False)
            answer = [*tokenizer.encode(question.answer, add_special_tokens=False), EOS]
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([IGNORE] * len(prompt) + answer))
    padded_ids = pad_sequence(ids, batch_first=True, padding_value=PAD)  # (B * Q, T)
    padded_labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE)
    prefix = torch.tensor(tokenizer.encode("<s>USER:", add_special_tokens=False))
    shape = (len(questions), -1, padded_ids.shape[1])
    return QuestionBatch(prefix, padded_ids.view(shape), padded_labels.view(shape))


def captions(scenes: list[Scene], rng: np.random.Generator) -> tuple[list[str], list[str], Tensor]:
    """Return a caption and one phrase per scene, and which phrase is true of which scene, (B phrases, B scenes)."""
    full, phrases = [], []
    for scene in scenes:
        parts = []
        for shape in scene.shapes:
            parts.append(f"{shape.size} {shape.color} {shape.shape} {PLACES[shape.cell]}")
        if scene.number is not None:
            first, last = scene.number.digits
            parts.append(f"{scene.number.color} number {first} {last}")
        order = rng.permutation(len(parts))  # shuffled, so that a position in the text says nothing of the image
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
    named = [f"{shape.color} {shape.shape}" for shape in scene.shapes]
    return phrase in named
