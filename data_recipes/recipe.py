"""A recipe: a YAML file that says which samples there are, and the data it turns into."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from data_recipes.images import FolderImages, ImageOpener, SceneImages
from data_recipes.llava_json import check_sources, read_llava
from data_recipes.parquet import ROW, ParquetImages, parquet_rows
from data_recipes.sample import DataError, Sample, Turn
from data_recipes.shapes_world import ask, sample_scene, split_seeds

ROW_FEATURES = Features(
    {
        "id": Value("string"),
        "source": Value("string"),
        "image": Value("string"),
        "turns": [{"question": Value("string"), "answer": Value("string")}],
    }
)
PARSER_VERSION = 1
"""Part of the cache's key: raise it when the same file is read into other rows."""
MIX = "llava_v1_5_mix665k.json"
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
    """Conversations in LLaVA's format, filtered by source and thinned by weights and caps."""

    format: Literal["llava_json"]
    file: str | None = Field(None, description="data file, relative to the recipe's own folder")
    sources: list[str] | None = Field(None, description="by image prefix, and text; None is everything in the file")
    weights: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=dict, description="share of a source that is kept"
    )
    caps: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="at most so many samples of a source"
    )
    held_out: int = Field(0, ge=0, description="samples set aside with all others of their pictures, never trained on")
    max_samples: int | None = Field(None, ge=1)
    max_missing: float | None = Field(None, ge=0, le=1)
    seed: int = 0


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
        recipe = TypeAdapter(Recipe).validate_python(yaml.safe_load(path.read_text()))
        if isinstance(recipe, LlavaJsonRecipe) and recipe.file is not None:
            recipe = recipe.model_copy(update={"file": str(path.parent / recipe.file)})
        return recipe
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, d['loc']))}: {d['msg']}" for d in error.errors())
        raise DataError(f"recipe {path}: {details}") from None


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
    rows, images = open_rows(recipe, file, image_root)
    own = recipe if isinstance(recipe, LlavaJsonRecipe) else None
    seed = next(value for value in (seed, own.seed if own else None, 0) if value is not None)
    max_samples = max_samples or (own.max_samples if own else None)
    rows, missing = _present(rows, images, tolerated(recipe, max_missing))
    order = list(range(len(rows)))
    held_out = None
    if isinstance(recipe, LlavaJsonRecipe):
        order = _thinned(recipe, rows["source"], seed)
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


def open_rows(
    recipe: ShapesWorldRecipe | LlavaJsonRecipe, file: str | None, image_root: str | None
) -> tuple[Dataset, ImageOpener]:
    """Return all rows of a recipe in their order, from the Arrow cache if they were read before, and the pictures.

    Raises:
        DataError: for a file or record that can't be used.
    """
    if isinstance(recipe, ShapesWorldRecipe):
        return Dataset.from_list([sample.to_row() for sample in _scene_samples(recipe)]), SceneImages()
    path = data_file(recipe, file, image_root)
    check_sources(recipe.sources or ())
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    try:
        rows = Dataset.from_generator(
            _llava_rows,
            features=ROW_FEATURES,
            gen_kwargs={
                "path": str(path.resolve()),
                "sources": None if recipe.sources is None else tuple(recipe.sources),  # lists are taken for shards
                "version": f"{PARSER_VERSION} {state}",
            },
        )
    except DatasetGenerationError as error:
        cause = error.__cause__
        raise cause if isinstance(cause, DataError) else error from None
    except DataError:
        raise
    if not len(rows):
        raise DataError(f"{path} has no sample of {', '.join(recipe.sources or ['any source'])}")
    embedded = any(image is not None and image.startswith(ROW) for image in rows["image"])
    return rows, ParquetImages(parquet_rows(path)) if embedded else FolderImages(image_root)


def data_file(recipe: LlavaJsonRecipe, file: str | None, image_root: str | None) -> Path:
    """Return the data file: the one given, the recipe's own, or LLaVA's mix lying in the folder of the pictures.

    Raises:
        DataError: if there is none of them.
    """
    named = file or recipe.file
    if named is not None:
        return Path(named)
    if image_root is not None and (Path(image_root) / MIX).is_file():
        return Path(image_root) / MIX
    raise DataError(f"recipe {recipe.name!r} reads a data file; set data.file")


def _llava_rows(path: str, sources: tuple[str, ...] | None, version: str) -> Iterator[dict[str, Any]]:
    """Yield rows; ``version`` is part of the cache's key, so that an edited file is read again."""
    for sample in read_llava(path, sources):
        yield sample.to_row()


def _thinned(recipe: LlavaJsonRecipe, sources: list[str], seed: int) -> list[int]:
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


def tolerated(recipe: ShapesWorldRecipe | LlavaJsonRecipe, max_missing: float | None) -> float:
    """Return the share of pictures that may be missing: the one asked for, the recipe's, or 1 %."""
    own = recipe.max_missing if isinstance(recipe, LlavaJsonRecipe) else None
    return next(value for value in (max_missing, own, 0.01) if value is not None)


def _held_out(recipe: LlavaJsonRecipe, images: list[str | None], order: list[int], seed: int) -> set[int]:
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


def _scene_samples(recipe: ShapesWorldRecipe) -> Iterator[Sample]:
    for seed in split_seeds(recipe.split, recipe.scenes):
        for number, question in enumerate(ask(sample_scene(seed))):
            turn = Turn(question.text, question.answer)
            yield Sample(f"{seed}-{number}", question.source, f"scene:{seed}", (turn,))
