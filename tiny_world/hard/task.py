"""The harder tiny world's benchmark: ten questions per scene, exact match."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prunetune.evaluation.tasks.base import Benchmark, Item, Scorer, register_task
from prunetune.tiny_world import split_seeds
from prunetune.tiny_world.hard import ask_hard, sample_hard_scene
from prunetune.tiny_world.hard.images import KIND, hard_images
from prunetune.tiny_world.images import SceneImages
from prunetune.tiny_world.task import exact_match

TEST_SCENES = 240


def read_hard_items(split: str, scenes: int) -> list[Item]:
    """Return the questions of the first ``scenes`` scenes of a split; an item's id ends in its kind."""
    items = []
    for seed in split_seeds(split, scenes):
        for number, question in enumerate(ask_hard(sample_hard_scene(seed))):
            name = f"{seed}-{number}-{question.kind}"
            items.append(Item(name, question.source, f"{KIND}:{seed}", question.text, question.answer))
    return items


@dataclass(frozen=True)
class HardScenes:
    """Reads the scenes of a split, which are drawn and lie in no folder."""

    split: str

    def read(self, data: Path) -> list[Item]:
        """Return the questions of the split's test scenes."""
        return read_hard_items(self.split, TEST_SCENES)

    def read_answers(self, data: Path) -> list[Item]:
        """Return the same questions."""
        return self.read(data)

    def open_images(self, data: Path) -> SceneImages:
        """Return what draws the scenes."""
        return hard_images()


for _name, _split, _about in (
    ("hard_world", "test", "240 scenes x 10 questions of the harder tiny world, from seeds no recipe was chosen on"),
    ("hard_world_validation", "validation", "the same on the seeds that recipes are chosen on"),
):
    register_task(
        Benchmark(
            name=_name,
            protocol="exact match",
            prompt="question",
            about=_about,
            readers=[HardScenes(_split)],
            scorer=Scorer(exact_match),
        )
    )
