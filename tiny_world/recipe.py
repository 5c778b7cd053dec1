"""The tiny world as a recipe format, ``shapes_world``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from prunetune.data_recipes import Sample, Turn
from prunetune.data_recipes.formats import Recipe, register_format
from prunetune.data_recipes.images import ImageOpener
from prunetune.tiny_world import ask, sample_scene, split_seeds
from prunetune.tiny_world.images import SceneImages as SceneImages

if TYPE_CHECKING:
    from datasets import Dataset


class ShapesWorldRecipe(Recipe):
    """Questions about scenes of the tiny world."""

    draws: ClassVar[bool] = True

    format: Literal["shapes_world"]
    split: str
    scenes: int = Field(ge=1)

    def open_rows(self, file: str | None, image_root: str | None) -> tuple[Dataset, ImageOpener]:
        """Return eight questions per scene; there is no file."""
        from datasets import Dataset  # takes seconds, and naming the formats does not need it

        return Dataset.from_list([sample.to_row() for sample in self._samples()]), SceneImages()

    def _samples(self) -> Iterator[Sample]:
        for seed in split_seeds(self.split, self.scenes):
            for number, question in enumerate(ask(sample_scene(seed))):
                turn = Turn(question.text, question.answer)
                yield Sample(f"{seed}-{number}", question.source, f"scene:{seed}", (turn,))


register_format("shapes_world", ShapesWorldRecipe, folder=Path(__file__).parent / "recipes")
