"""Batches of the tiny world as tensors: pixels, patch labels, captions, and eight questions in one row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from prunetune.tiny_world import Question, Scene, render, sample_scene
from prunetune.tiny_world.scene import COLORS, PLACES, SHAPES, SIZES, patch_cover
from prunetune.tiny_world.training.model import EOS, PAD

VISIBLE = 0.08  # a patch shows a thing from this share of its pixels on
PATCH_LABELS = {"form": len(SHAPES) + 2, "color": len(COLORS) + 1, "size": len(SIZES) + 1, "digit": 11}
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
    pixels = torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2) / 127.5 - 1
    labels = {name: np.zeros((len(scenes), 144), dtype=np.int64) for name in PATCH_LABELS}
    words = np.zeros((len(scenes), 144, len(tokenizer)), dtype=np.float32)
    index = tokenizer.get_vocab()
    for row, scene in enumerate(scenes):
        cover = patch_cover(scene)
        owner, seen = cover.argmax(0), cover.max(0) > VISIBLE
        for thing, described in enumerate(_things(scene)):
            mine = seen & (owner == thing)
            for name, value in described["labels"].items():
                labels[name][row, mine] = value
            ids = [index[word] for word in described["words"]]
            words[row][np.ix_(mine, ids)] = 1 / len(ids)
    return SceneBatch(pixels, {k: torch.from_numpy(v) for k, v in labels.items()}, torch.from_numpy(words), scenes)


def _things(scene: Scene) -> list[dict]:
    things = []
    for shape in scene.shapes:
        labels = {
            "form": 1 + SHAPES.index(shape.shape),
            "color": 1 + COLORS.index(shape.color),
            "size": 1 + SIZES.index(shape.size),
        }
        things.append({"labels": labels, "words": [shape.size, shape.color, shape.shape, PLACES[shape.cell]]})
    if scene.number is not None:
        for order, digit in zip(("first", "last"), scene.number.digits, strict=True):
            labels = {"form": 1 + len(SHAPES), "color": 1 + COLORS.index(scene.number.color), "digit": 1 + digit}
            things.append({"labels": labels, "words": ["number", order, str(digit), scene.number.color]})
    return things


def question_batch(questions: list[list[Question]], tokenizer: PreTrainedTokenizerFast) -> QuestionBatch:
    """Return equally many questions per scene as ``question ASSISTANT: answer</s>`` with loss on the answer only."""
    rows = []
    for asked in questions:
        for question in asked:
            prompt = tokenizer.encode(f"{question.text} ASSISTANT:", add_special_tokens=False)
            answer = [*tokenizer.encode(question.answer, add_special_tokens=False), EOS]
            rows.append((prompt + answer, [IGNORE] * len(prompt) + answer))
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [PAD] * (length - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORE] * (length - len(labels)) for _, labels in rows])
    prefix = torch.tensor(tokenizer.encode("<s>USER:", add_special_tokens=False))
    return QuestionBatch(prefix, ids.view(len(questions), -1, length), labels.view(len(questions), -1, length))


def captions(scenes: list[Scene], rng: np.random.Generator) -> tuple[list[str], list[str], Tensor]:
    """Return a caption and one phrase per scene, and which phrase is true of which scene, (B phrases, B scenes)."""
    full, phrases = [], []
    for scene in scenes:
        parts = [" ".join([s.size, s.color, s.shape, PLACES[s.cell]]) for s in scene.shapes]
        if scene.number is not None:
            parts.append(f"{scene.number.color} number {scene.number.digits[0]} {scene.number.digits[1]}")
        full.append(" , ".join(parts[i] for i in rng.permutation(len(parts))))
        shape = scene.shapes[rng.integers(len(scene.shapes))]
        drop = rng.random() < 0.3 and scene.number is not None
        phrases.append("number" if drop else f"{shape.color} {shape.shape}")
    true = [[_holds(phrase, scene) for scene in scenes] for phrase in phrases]
    return full, phrases, torch.tensor(true)


def _holds(phrase: str, scene: Scene) -> bool:
    if phrase == "number":
        return scene.number is not None
    return any(phrase == f"{s.color} {s.shape}" for s in scene.shapes)
