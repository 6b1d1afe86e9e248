"""Recipes that travel: to another batch size, and from Mean to Sum and back."""

from anybatch.recipe.scaling.carry import carry
from anybatch.recipe.scaling.changes import Carried, Change, Rule
from anybatch.recipe.scaling.convert import convert
from anybatch.recipe.scaling.scale import at_its_size, scale
from anybatch.recipe.scaling.text import file_of, table_of
from anybatch.recipe.scaling.told import tell

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
