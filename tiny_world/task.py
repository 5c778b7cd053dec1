"""The tiny world's benchmark: eight questions per scene, exact match."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prunetune.evaluation.tasks.base import Benchmark, Item, Scorer, register_task
from prunetune.tiny_world import ask, sample_scene, split_seeds
from prunetune.tiny_world.images import SceneImages

TEST_SCENES = 300


def read_items(split: str, scenes: int) -> list[Item]:
    """Return the questions of the first ``scenes`` scenes of a split."""
    items = []
    for seed in split_seeds(split, scenes):
        for number, question in enumerate(ask(sample_scene(seed))):
            items.append(Item(f"{seed}-{number}", question.source, f"scene:{seed}", question.text, question.answer))
    return items


def exact_match(prediction: str, item: Item) -> float:
    """Return 1 if the prediction's words are the answer's words, in order, else 0."""
    return float(prediction.lower().split() == item.answer.split())


@dataclass(frozen=True)
class Scenes:
    """Reads the scenes of a split, which are drawn and lie in no folder."""

    split: str

    def read(self, data: Path) -> list[Item]:
        """Return the questions of the split's test scenes."""
        return read_items(self.split, TEST_SCENES)

    def read_answers(self, data: Path) -> list[Item]:
        """Return the same questions."""
        return self.read(data)

    def open_images(self, data: Path) -> SceneImages:
        """Return what draws the scenes."""
        return SceneImages()


for _name, _split, _about in (
    ("tiny_world", "test", "300 scenes x 8 questions of the tiny world, from seeds no recipe was chosen on"),
    ("tiny_world_validation", "validation", "the same on the seeds that recipes are chosen on"),
):
    register_task(
        Benchmark(
            name=_name,
            protocol="exact match",
            prompt="question",
            about=_about,
            readers=[Scenes(_split)],
            scorer=Scorer(exact_match),
        )
    )
