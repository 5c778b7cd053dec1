"""A recipe: a YAML file that says which samples there are, and the data it turns into."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from datasets import Dataset
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from data_recipes.images import FolderImages, ImageOpener, SceneImages
from data_recipes.llava_json import read_llava_json
from data_recipes.sample import DataError, Sample, Turn
from data_recipes.shapes_world import ask, sample_scene, split_seeds

RECIPE_FOLDER = Path(__file__).parent / "recipes"


class _Recipe(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str


class ShapesWorldRecipe(_Recipe):
    """Questions about scenes of the tiny world."""

    format: Literal["shapes_world"]
    split: str
    scenes: int = Field(ge=1)


class LlavaJsonRecipe(_Recipe):
    """Conversations of a LLaVA-format JSON file, filtered by source."""

    format: Literal["llava_json"]
    sources: list[str]


Recipe = Annotated[ShapesWorldRecipe | LlavaJsonRecipe, Field(discriminator="format")]


@dataclass(frozen=True)
class RecipeData:
    """Samples ready to train on, and how they came about.

    Attributes:
        name: the recipe's name.
        rows: one row per sample, see ``Sample.to_row``.
        images: opens the samples' pictures.
        content_hash: SHA-256 of all rows in order.
        counts: samples per source.
        missing: samples left out because their image file is missing.
    """

    name: str
    rows: Dataset
    images: ImageOpener
    content_hash: str
    counts: dict[str, int]
    missing: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return Sample.from_row(self.rows[index])


def recipe_names() -> list[str]:
    """Return the shipped recipes."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def read_recipe(name: str) -> ShapesWorldRecipe | LlavaJsonRecipe:
    """Return the recipe of a shipped name or of a YAML path.

    Raises:
        DataError: if there is none, or it does not validate.
    """
    path = RECIPE_FOLDER / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        raise DataError(
            f"unknown recipe {name!r}; there are {', '.join(recipe_names())}, or give the path of a YAML file"
        )
    try:
        return TypeAdapter(Recipe).validate_python(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, d['loc']))}: {d['msg']}" for d in error.errors())
        raise DataError(f"recipe {path}: {details}") from None


def load_recipe(
    name: str,
    *,
    file: str | None = None,
    image_root: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    max_missing: float = 0.01,
) -> RecipeData:
    """Read a recipe's samples, check that their pictures are there, and draw the subset.

    Args:
        name: a shipped recipe or the path of a YAML file.
        file: data file, for recipes that read one.
        image_root: folder of the pictures, for recipes that read files.
        max_samples: size of a seeded subset in file order; None is all.
        seed: seed of the subset.
        max_missing: largest tolerated share of samples without their picture; those are left out and named.

    Raises:
        DataError: for anything that can't be read, or too many missing pictures.
    """
    recipe = read_recipe(name)
    images: ImageOpener
    if isinstance(recipe, ShapesWorldRecipe):
        samples, images = list(_scene_samples(recipe)), SceneImages()
    else:
        if file is None:
            raise DataError(f"recipe {recipe.name!r} reads a data file; set data.file")
        samples, images = read_llava_json(file, recipe.sources), FolderImages(image_root)
    samples, missing = _present(samples, images, max_missing)
    if max_samples is not None and max_samples < len(samples):
        chosen = sorted(random.Random(seed).sample(range(len(samples)), max_samples))
        samples = [samples[index] for index in chosen]
    rows = [sample.to_row() for sample in samples]
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
    counts = dict(sorted(Counter(sample.source for sample in samples).items()))
    return RecipeData(recipe.name, Dataset.from_list(rows), images, digest.hexdigest(), counts, missing)


def _present(samples: list[Sample], images: ImageOpener, max_missing: float) -> tuple[list[Sample], list[str]]:
    """Split samples by whether their picture is there."""
    there = [sample.image is None or images.exists(sample.image) for sample in samples]
    missing = [sample for sample, present in zip(samples, there, strict=True) if not present]
    if len(missing) > max_missing * len(samples):
        some = ", ".join(str(sample.image) for sample in missing[:3])
        raise DataError(
            f"{len(missing)} of {len(samples)} samples miss their image file ({some}, ...), more than "
            f"max_missing={max_missing:.2%} allows; check data.image_root or raise data.max_missing"
        )
    present = [sample for sample, here in zip(samples, there, strict=True) if here]
    return present, [str(sample.image) for sample in missing]


def _scene_samples(recipe: ShapesWorldRecipe) -> Iterator[Sample]:
    for seed in split_seeds(recipe.split, recipe.scenes):
        for number, question in enumerate(ask(sample_scene(seed))):
            turn = Turn(question.text, question.answer)
            yield Sample(f"{seed}-{number}", question.source, f"scene:{seed}", (turn,))
