"""A recipe: a YAML file that says which samples there are, and the data it turns into."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ValidationError

from prunetune.data_recipes.content import column, content_hash
from prunetune.data_recipes.formats import LlavaJsonRecipe, Recipe, format_of, recipe_folders
from prunetune.data_recipes.images import ImageOpener, limited
from prunetune.data_recipes.sample import DataError, Sample
from prunetune.reading import read_yaml, shown

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


@dataclass(frozen=True)
class RecipeData:
    """Samples ready to train on, and how they came about.

    Attributes:
        name: the recipe's name.
        rows: one row per sample, see ``Sample.to_row``.
        images: opens the samples' images.
        content_hash: SHA-256 of all rows in order, see :func:`prunetune.data_recipes.content.content_hash`.
        counts: samples per source.
        missing: samples left out because their image file is missing.
        held_out: rows set aside by the recipe, of the same kind.
        broken: records left out because they are no conversation, each with what is wrong with it.
        split_from: the content hash of the samples that a run took its held-out ones from; None of all others.
    """

    name: str
    rows: Dataset
    images: ImageOpener
    content_hash: str
    counts: dict[str, int]
    missing: list[str]
    held_out: Dataset | None = None
    broken: Sequence[str] = ()
    split_from: str | None = None

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
    try:
        if path.is_file():
            return path
    except OSError as error:  # the name is too long, or its folder may not be read
        raise DataError(f"recipe {path} can't be read: {error.strerror}") from None
    raise DataError(f"unknown recipe {name!r}; there are {', '.join(recipe_names())}, or give the path of a YAML file")


def _shipped() -> dict[str, Path]:
    shipped = {}
    for folder in recipe_folders():
        for path in folder.glob("*.yaml"):
            shipped[path.stem] = path
    return shipped


def read_recipe(name: str) -> Recipe:
    """Return the recipe of a shipped name or of a YAML path.

    Raises:
        DataError: if there is none, or it does not validate.
    """
    path = recipe_file(name)
    values = read_yaml(path, DataError)
    if not isinstance(values, dict) or "format" not in values:
        raise DataError(f"recipe {path} names no format; write `format: llava_json`, for example")
    try:
        recipe = format_of(values["format"]).model_validate(values)
    except ValidationError as error:
        details = []
        for problem in error.errors():
            option = ".".join(map(str, problem["loc"]))
            details.append(f"{option}: {problem['msg']}, got {shown(problem['input'])}")
        raise DataError(f"recipe {path}: {'; '.join(details)}") from None
    # A file named in a recipe lies beside it, wherever the command runs.
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
    max_broken: float | None = None,
    max_pixels: int | None = None,
    questions: bool = False,
) -> RecipeData:
    """Read a recipe's samples, check that their images are there, and draw the subset.

    Args:
        name: a shipped recipe or the path of a YAML file.
        file: data file, for recipes that read one.
        image_root: folder of the images, for recipes that read files.
        max_samples: size of a seeded subset in file order; None is all.
        seed: seed of the subset; None is the recipe's, or 0.
        max_missing: largest tolerated share of samples without their image, which are left out and named; None is
            the recipe's, or 1 %.
        max_broken: the same of records that are no conversation.
        max_pixels: largest image that is decoded; None is the opener's own limit.
        questions: read what is asked alone, answered or not; nothing is held out then.

    Raises:
        DataError: for anything that can't be read, too many missing images or broken records.
    """
    recipe = read_recipe(name)
    rows, images = (recipe.open_questions if questions else recipe.open_rows)(file, image_root)
    if seed is None:
        seed = recipe.seed
    max_samples = max_samples or recipe.max_samples
    images = limited(images, max_pixels)
    rows, broken = _whole(rows, tolerated(recipe.max_broken, max_broken))
    rows, missing = _present(rows, images, tolerated(recipe.max_missing, max_missing))
    order = _thinned(recipe, column(rows, "source"), seed)
    held_out = None
    # Before the subset is drawn, so that a smaller subset holds out the same images.
    if recipe.held_out and not questions:
        held = _held_out(recipe, column(rows, "image"), order, seed)
        held_out = rows.select(order[held])
        order = order[~held]
    if not len(order):
        raise DataError(f"recipe {recipe.name!r} leaves no sample to train on")
    if max_samples is not None and max_samples < len(order):
        order = np.sort(order[random.Random(seed).sample(range(len(order)), max_samples)])
    if len(order) < len(rows):  # a selection of everything would cost each look-up one more
        rows = rows.select(order)
    return RecipeData(recipe.name, rows, images, content_hash(rows), counts_of(rows), missing, held_out, broken)


def counts_of(rows: Dataset) -> dict[str, int]:
    """Return how many samples each source has."""
    found = column(rows, "source").value_counts().to_pylist()
    return {pair["values"]: pair["counts"] for pair in sorted(found, key=lambda pair: str(pair["values"]))}


def _thinned(recipe: Recipe, sources: pa.ChunkedArray, seed: int) -> np.ndarray:
    """Return the rows that weights and caps leave, in order.

    Of the sources ``[vg, gqa, vg, gqa]`` with the weight 0.5 for vg and no cap, one of the rows 0 and 2 is drawn, and
    1 and 3 stay.

    Raises:
        DataError: for a source that the data does not have.
    """
    codes, names = _codes(sources)
    strange = (set(recipe.weights) | set(recipe.caps)) - set(names)
    if strange:
        raise DataError(f"recipe {recipe.name!r} weighs or caps {sorted(strange)}, which the data does not have")
    kept = np.ones(len(codes), dtype=bool)
    for code, source in enumerate(names):
        rows = np.flatnonzero(codes == code)
        weighted = round(recipe.weights.get(source, 1.0) * len(rows))
        number = min(max(weighted, 1), recipe.caps.get(source, len(rows)))
        if number < len(rows):
            # A generator of each source's own: another source's weight leaves this draw as it was.
            drawn = random.Random(f"{source} {seed}").sample(range(len(rows)), number)
            kept[rows] = False
            kept[rows[drawn]] = True
    return np.flatnonzero(kept)


def _codes(values: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Return for each value which of the names it is; the names in the order of their first appearance."""
    encoded = values.combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False), encoded.dictionary.to_pylist()


def tolerated(recipes: float | None, asked: float | None) -> float:
    """Return the share of samples that may be unusable: the one asked for, the recipe's, or 1 %."""
    if asked is not None:
        return asked
    return 0.01 if recipes is None else recipes


def _held_out(recipe: Recipe, images: pa.ChunkedArray, order: np.ndarray, seed: int) -> np.ndarray:
    """Return which of ``order`` are held out: at least ``held_out``, whole images, so that none is trained on.

    Raises:
        DataError: if nothing would be left.
    """
    import pyarrow as pa

    held = whole_images(pa.chunked_array([images.combine_chunks().take(pa.array(order))]), recipe.held_out, seed)
    if held.all():
        raise DataError(f"recipe {recipe.name!r} holds out {recipe.held_out} of only {len(order)} samples")
    return held


def whole_images(images: pa.ChunkedArray, number: int, seed: int) -> np.ndarray:
    """Return which samples are held out, boolean: at least ``number`` in all, whole images at a time.

    Args:
        images: the image of each sample.
        number: of samples.
        seed: of the draw.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    chosen = images.combine_chunks()
    # A sample without an image is a group of its own.
    alone = pa.array([f"text {index}" for index in range(len(chosen))])
    named = pc.if_else(pc.fill_null(pc.not_equal(chosen, ""), False), chosen, alone)
    codes, names = _codes(pa.chunked_array([named]))
    groups = list(range(len(names)))
    random.Random(f"held out {seed}").shuffle(groups)
    groups.reverse()
    held_in_all = np.cumsum(np.bincount(codes, minlength=len(names))[groups])
    enough = int(np.searchsorted(held_in_all, number)) + 1  # groups until there are enough
    held = np.zeros(len(names), dtype=bool)
    held[groups[:enough]] = True
    return held[codes]


def _whole(rows: Dataset, max_broken: float) -> tuple[Dataset, list[str]]:
    """Leave out the rows of records that are no conversation, and return what is wrong with each."""
    if "broken" not in rows.column_names:
        return rows, []
    faults = column(rows, "broken")
    broken = faults.drop_null().to_pylist()
    if len(broken) > max_broken * len(rows):
        raise DataError(
            f"{len(broken)} of {len(rows)} records are no conversation ({'; '.join(broken[:3])}), more than "
            f"max_broken={max_broken:.2%} allows; `prunetune data check` names them all, mend them or raise "
            "data.max_broken"
        )
    rows = rows.remove_columns("broken")
    if broken:  # a selection costs every later look-up one more
        rows = rows.select(np.flatnonzero(faults.is_null().to_numpy()))
    return rows, broken


def _present(rows: Dataset, images: ImageOpener, max_missing: float) -> tuple[Dataset, list[str]]:
    """Leave out the rows whose image is not there, and return their references."""
    import pyarrow as pa
    import pyarrow.compute as pc

    named = column(rows, "image")
    gone = _missing_of(images, named.unique().drop_null().to_pylist())
    if not gone:
        return rows, []
    absent = pc.is_in(named, value_set=pa.array(sorted(gone), type=named.type))
    missing = named.filter(absent).to_pylist()
    if len(missing) > max_missing * len(rows):
        raise DataError(
            f"{len(missing)} of {len(rows)} samples miss their image file ({', '.join(missing[:3])}, ...), more than "
            f"max_missing={max_missing:.2%} allows; check data.image_root or raise data.max_missing"
        )
    return rows.select(np.flatnonzero(~absent.to_numpy())), missing


def _missing_of(images: ImageOpener, references: list[str]) -> set[str]:
    """Return the references that are not there, from listings where the opener has folders to list."""
    listed = getattr(images, "missing", None)
    if listed is not None:
        return set(listed(references))
    return {reference for reference in references if not images.exists(reference)}
