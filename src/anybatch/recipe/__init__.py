"""Recipes: everything a run depends on, in one TOML file."""

from anybatch.recipe.build import Setup, build
from anybatch.recipe.files import find_recipe, format_recipe, read_recipe
from anybatch.recipe.schema import Recipe

__all__ = ["Recipe", "Setup", "build", "find_recipe", "format_recipe", "read_recipe"]
