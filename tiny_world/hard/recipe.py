"""The harder tiny world as a recipe format, ``hard_shapes_world``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from prunetune.data_recipes import Sample, Turn
from prunetune.data_recipes.formats import Recipe, register_format
from prunetune.data_recipes.images import ImageOpener
from prunetune.tiny_world import split_seeds
from prunetune.tiny_world.hard import ask_hard, sample_hard_scene
from prunetune.tiny_world.hard.images import KIND, hard_images

if TYPE_CHECKING:
    from datasets import Dataset


class HardWorldRecipe(Recipe):
    """Questions about scenes of the harder tiny world."""

    draws: ClassVar[bool] = True

    format: Literal["hard_shapes_world"]
    split: str
    scenes: int = Field(ge=1)

    def open_rows(self, file: str | None, image_root: str | None) -> tuple[Dataset, ImageOpener]:
        """Return ten questions per scene; there is no file."""
        from datasets import Dataset  # takes seconds, and naming the formats does not need it

        return Dataset.from_list([sample.to_row() for sample in self._samples()]), hard_images()

    def _samples(self) -> Iterator[Sample]:
        for seed in split_seeds(self.split, self.scenes):
            for number, question in enumerate(ask_hard(sample_hard_scene(seed))):
                turn = Turn(question.text, question.answer)
                yield Sample(f"{seed}-{number}", question.source, f"{KIND}:{seed}", (turn,))


register_format("hard_shapes_world", HardWorldRecipe, folder=Path(__file__).parent / "recipes")
