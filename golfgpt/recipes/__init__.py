"""Recipes: named starting configurations. Each is derived from another one by replacing a few fields.

A recipe that produced a published number is never edited. A new recipe gets a new name. Standard library only.
"""

from __future__ import annotations

import difflib

from golfgpt.errors import InputError
from golfgpt.recipes.early import EARLY
from golfgpt.recipes.ours import OURS
from golfgpt.recipes.recipe import Recipe
from golfgpt.recipes.records import RECORDS

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*EARLY, *RECORDS, *OURS)}


def get(name: str) -> Recipe:
    """The recipe called `name`. Raises InputError for an unknown name, with the closest known one."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"unknown recipe {name!r}{hint} (expected one of {', '.join(RECIPES)})")
    return RECIPES[name]
