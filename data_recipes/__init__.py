"""Recipes that turn data sources into conversation samples, and conversations into model inputs."""

if __name__ != "prunetune.data_recipes":
    raise ImportError("import prunetune.data_recipes, not data_recipes: a second name would load everything twice")

from prunetune.data_recipes.formatting import Formatter
from prunetune.data_recipes.recipe import RecipeData, load_recipe, recipe_names
from prunetune.data_recipes.sample import DataError, Sample, Turn

__all__ = ["DataError", "Formatter", "RecipeData", "Sample", "Turn", "load_recipe", "recipe_names"]
