"""What a training or a score costs, in seconds that one core is busy."""

from __future__ import annotations

import json
from statistics import median
from typing import Any

from findings_study.plan import Score
from findings_study.training import ANSWERS, PICTURES, Recipe

PER_TOKEN = 5.8e-5
"""Seconds of one picture's token in a training step, where nothing was measured yet."""
TEXT = 78
"""Tokens of a scene's eight questions."""


def tokens_of(recipe: Recipe) -> float:
    """Return the tokens of an average row."""
    weight = sum(weight for _, weight in recipe.cells)
    pruned = sum(weight * cell.keep for cell, weight in recipe.cells) / weight
    names = {name for name, _ in recipe.terms}
    text = TEXT if names.intersection(ANSWERS) or "hidden" in names else 0
    dense = 0.25 if recipe.sandwich else recipe.dense
    return text + 3 + dense * 144 + (1 - dense) * pruned


def training_seconds(recipe: Recipe, rows: list[dict[str, Any]]) -> float:
    """Return what a training will take: as stored ones did that differ in seed, data, rate and length alone."""
    rates = []
    for row in rows:
        if "recipe" in row and _kind(row["recipe"]) == _kind(recipe.settings()):
            rates.append(row["busy"] / row["recipe"]["steps"])
    if rates:
        return recipe.steps * median(rates)
    return recipe.steps * PICTURES * tokens_of(recipe) * PER_TOKEN


def _kind(settings: dict[str, Any]) -> str:
    """Return what decides the cost of an update."""
    return json.dumps({name: settings[name] for name in ("cells", "terms", "dense", "sandwich", "hidden_layer")})


def scoring_seconds(score: Score) -> float:
    """Return what a score of 300 scenes will take."""
    return 300 * (TEXT + score.cell.keep) * PER_TOKEN / 2.5
