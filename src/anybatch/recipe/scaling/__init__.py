"""Recipes that travel: to another batch size, and from Mean to Sum and back."""

from anybatch.recipe.scaling.carry import carry
from anybatch.recipe.scaling.changes import Carried, Change, Rule, file_of, table_of, tell
from anybatch.recipe.scaling.convert import convert
from anybatch.recipe.scaling.scale import at_its_size, scale

__all__ = [
    "Carried",
    "Change",
    "Rule",
    "at_its_size",
    "carry",
    "convert",
    "file_of",
    "scale",
    "table_of",
    "tell",
]
