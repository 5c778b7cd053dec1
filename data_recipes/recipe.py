"""A recipe: a YAML file that says which samples there are, and the data it turns into."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import ValidationError

from prunetune.data_recipes.formats import LlavaJsonRecipe, Recipe, format_of, recipe_folders
from prunetune.data_recipes.images import ImageOpener
from prunetune.data_recipes.sample import DataError, Sample

if TYPE_CHECKING:
    from datasets import Dataset


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
        held_out: rows set aside by the recipe, of the same kind.
    """

    name: str
    rows: Dataset
    images: ImageOpener
    content_hash: str
    counts: dict[str, int]
    missing: list[str]
    held_out: Dataset | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return Sample.from_row(self.rows[index])


def recipe_names() -> list[str]:
    """Return the shipped recipes."""
    return sorted(_shipped())


def recipe_file(name: str) -> Path:
    """Return the file of a shipped recipe's name, or of a path.

    Raises:
        DataError: if there is none.
    """
    path = _shipped().get(name, Path(name))
    if not path.is_file():
        raise DataError(
            f"unknown recipe {name!r}; there are {', '.join(recipe_names())}, or give the path of a YAML file"
        )
    return path


def _shipped() -> dict[str, Path]:
    return {path.stem: path for folder in recipe_folders() for path in folder.glob("*.yaml")}


def read_recipe(name: str) -> Recipe:
    """Return the recipe of a shipped name or of a YAML path.

    Raises:
        DataError: if there is none, or it does not validate.
    """
    path = recipe_file(name)
    values = yaml.safe_load(path.read_text())
    if not isinstance(values, dict) or "format" not in values:
        raise DataError(f"recipe {path} names no format; write `format: llava_json`, for example")
    try:
        recipe = format_of(values["format"]).model_validate(values)
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, d['loc']))}: {d['msg']}" for d in error.errors())
        raise DataError(f"recipe {path}: {details}") from None
    if isinstance(recipe, LlavaJsonRecipe) and recipe.file is not None:
        recipe = recipe.model_copy(update={"file": str(path.parent / recipe.file)})
    return recipe


def load_recipe(
    name: str,
    *,
    file: str | None = None,
    image_root: str | None = None,
    max_samples: int | None = None,
    seed: int | None = None,
    max_missing: float | None = None,
) -> RecipeData:
    """Read a recipe's samples, check that their pictures are there, and draw the subset.

    Args:
        name: a shipped recipe or the path of a YAML file.
        file: data file, for recipes that read one.
        image_root: folder of the pictures, for recipes that read files.
        max_samples: size of a seeded subset in file order; None is all.
        seed: seed of the subset; None is the recipe's, or 0.
        max_missing: largest tolerated share of samples without their picture, which are left out and named; None is
            the recipe's, or 1 %.

    Raises:
        DataError: for anything that can't be read, or too many missing pictures.
    """
    recipe = read_recipe(name)
    rows, images = recipe.open_rows(file, image_root)
    seed = recipe.seed if seed is None else seed
    max_samples = max_samples or recipe.max_samples
    rows, missing = _present(rows, images, tolerated(recipe, max_missing))
    order = _thinned(recipe, rows["source"], seed)
    held_out = None
    if recipe.held_out:
        apart = _held_out(recipe, rows["image"], order, seed)
        held_out, order = rows.select(sorted(apart)), [index for index in order if index not in apart]
    if not order:
        raise DataError(f"recipe {recipe.name!r} leaves no sample to train on")
    if max_samples is not None and max_samples < len(order):
        order = sorted(random.Random(seed).sample(order, max_samples))
    if len(order) < len(rows):
        rows = rows.select(order)
    digest, counts = hashlib.sha256(), Counter[str]()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
        counts[row["source"]] += 1
    return RecipeData(recipe.name, rows, images, digest.hexdigest(), dict(sorted(counts.items())), missing, held_out)


def _thinned(recipe: Recipe, sources: list[str], seed: int) -> list[int]:
    """Return the rows that weights and caps leave, in order.

    Raises:
        DataError: for a source that the data does not have.
    """
    strange = (set(recipe.weights) | set(recipe.caps)) - set(sources)
    if strange:
        raise DataError(f"recipe {recipe.name!r} weighs or caps {sorted(strange)}, which the data does not have")
    places: dict[str, list[int]] = {}
    for index, source in enumerate(sources):
        places.setdefault(source, []).append(index)
    kept = []
    for source, own in places.items():
        number = min(max(round(recipe.weights.get(source, 1.0) * len(own)), 1), recipe.caps.get(source, len(own)))
        kept += own if number == len(own) else random.Random(f"{source} {seed}").sample(own, number)
    return sorted(kept)


def tolerated(recipe: Recipe, max_missing: float | None) -> float:
    """Return the share of pictures that may be missing: the one asked for, the recipe's, or 1 %."""
    return next(value for value in (max_missing, recipe.max_missing, 0.01) if value is not None)


def _held_out(recipe: Recipe, images: list[str | None], order: list[int], seed: int) -> set[int]:
    """Return at least ``held_out`` of the rows in ``order``, whole pictures at a time, so that none is trained on.

    Raises:
        DataError: if nothing would be left.
    """
    groups: dict[str, list[int]] = {}
    for index in order:
        groups.setdefault(images[index] or f"text {index}", []).append(index)
    names = list(groups)
    random.Random(f"held out {seed}").shuffle(names)
    apart: set[int] = set()
    while names and len(apart) < recipe.held_out:
        apart.update(groups[names.pop()])
    if len(apart) >= len(order):
        raise DataError(f"recipe {recipe.name!r} holds out {recipe.held_out} of only {len(order)} samples")
    return apart


def _present(rows: Dataset, images: ImageOpener, max_missing: float) -> tuple[Dataset, list[str]]:
    """Leave out the rows whose picture is not there, and return their references."""
    there = [image is None or images.exists(image) for image in rows["image"]]
    missing = [str(image) for image, here in zip(rows["image"], there, strict=True) if not here]
    if len(missing) > max_missing * len(rows):
        raise DataError(
            f"{len(missing)} of {len(rows)} samples miss their image file ({', '.join(missing[:3])}, ...), more than "
            f"max_missing={max_missing:.2%} allows; check data.image_root or raise data.max_missing"
        )
    return (rows.select([index for index, here in enumerate(there) if here]) if missing else rows), missing
