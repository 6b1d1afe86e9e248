"""Rescale a recipe to another batch size or reduction, with a reason for each change."""

from anybatch.recipe.scaling.changes import (
    Change,
    Rule,
    ScaledRecipe,
    format_file,
    format_table,
    report_changes,
)
from anybatch.recipe.scaling.convert import convert
from anybatch.recipe.scaling.rescale import rescale
from anybatch.recipe.scaling.scale import rescale_to_batch_size, scale

__all__ = [
    "Change",
    "Rule",
    "ScaledRecipe",
    "convert",
    "format_file",
    "format_table",
    "report_changes",
    "rescale",
    "rescale_to_batch_size",
    "scale",
]
