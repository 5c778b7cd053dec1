"""The tiny world's benchmark: eight questions per scene, exact match."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from prunetune.evaluation.tasks.base import Item, Task, register_task
from prunetune.tiny_world import ask, sample_scene, split_seeds
from prunetune.tiny_world.recipe import SceneImages

TEST_SCENES = 300


def read_items(split: str, scenes: int) -> list[Item]:
    """Return the questions of the first ``scenes`` scenes of a split."""
    return [
        Item(f"{seed}-{number}", question.source, f"scene:{seed}", question.text, question.answer)
        for seed in split_seeds(split, scenes)
        for number, question in enumerate(ask(sample_scene(seed)))
    ]


def exact_match(prediction: str, item: Item) -> float:
    """Return 1 if the prediction's words are the answer's words, in order, else 0."""
    return float(prediction.lower().split() == item.answer.split())


def _read(split: str, _: Path) -> list[Item]:
    return read_items(split, TEST_SCENES)


for _name, _split, _about in (
    ("tiny_world", "test", "300 scenes x 8 questions of the tiny world, from seeds no recipe was chosen on"),
    ("tiny_world_validation", "validation", "the same on the seeds that recipes are chosen on"),
):
    register_task(
        Task(
            name=_name,
            protocol="exact match",
            prompt="question",
            read=partial(_read, _split),
            images=lambda _: SceneImages(),
            score=exact_match,
            about=_about,
        )
    )
