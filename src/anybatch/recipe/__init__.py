"""Recipes: everything a run depends on, in one TOML file."""

from anybatch.recipe.build import Built, build
from anybatch.recipe.files import find, read, text_of
from anybatch.recipe.schema import Recipe

__all__ = ["Built", "Recipe", "build", "find", "read", "text_of"]
