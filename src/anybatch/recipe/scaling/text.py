"""A carried recipe as a file: what changed and why as comments, and below it the recipe."""

from collections.abc import Iterator
from typing import Any

from anybatch.recipe.files import text_of
from anybatch.recipe.scaling.changes import Carried

__all__ = ["file_of", "table_of"]

TITLES = ("key", "old", "new", "rule", "why")


def file_of(carried: Carried) -> str:
    """The recipe as TOML, the table as its head, keys at their defaults left out."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in table_of(carried))
    return f"{head}\n{text_of(carried.recipe, defaults=False)}"


def table_of(carried: Carried) -> Iterator[str]:
    """A line for each change, in columns, and then the warnings."""
    rows = [
        (change.key, _word(change.old), _word(change.new), change.rule, change.why)
        for change in carried.changes
    ]
    widths = [max(map(len, column)) for column in zip(TITLES, *rows, strict=True)]
    for row in [TITLES, *rows] if rows else [("Nothing changes.",)]:
        yield "  ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=False))
    for warning in carried.warnings:
        yield ""
        yield f"Warning: {warning}."


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_word, value))}]"
    return "none" if value is None else str(value)
