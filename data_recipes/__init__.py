"""Recipes that turn data sources into conversation samples, and conversations into model inputs."""

from data_recipes.formatting import Formatter
from data_recipes.recipe import RecipeData, load_recipe, recipe_names
from data_recipes.sample import DataError, Sample, Turn

__all__ = ["DataError", "Formatter", "RecipeData", "Sample", "Turn", "load_recipe", "recipe_names"]
