"""Recipes that turn data sources into conversation samples, and conversations into model inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunetune.lazy import importer

if __name__ != "prunetune.data_recipes":
    raise ImportError("import prunetune.data_recipes, not data_recipes: a second name would load everything twice")

if TYPE_CHECKING:
    from prunetune.data_recipes.formatting import Formatter as Formatter
    from prunetune.data_recipes.recipe import RecipeData as RecipeData
    from prunetune.data_recipes.recipe import load_recipe as load_recipe
    from prunetune.data_recipes.recipe import recipe_names as recipe_names
    from prunetune.data_recipes.sample import DataError as DataError
    from prunetune.data_recipes.sample import Sample as Sample
    from prunetune.data_recipes.sample import Turn as Turn

# A name is imported when it is first used: reading answers needs neither torch nor datasets.
_HOMES = {
    "DataError": "sample",
    "Formatter": "formatting",
    "RecipeData": "recipe",
    "Sample": "sample",
    "Turn": "sample",
    "load_recipe": "recipe",
    "recipe_names": "recipe",
}

__all__ = list(_HOMES)
__getattr__ = importer(__name__, _HOMES)
