"""Changes to the keys of a recipe, each with its reason, and how they are shown and recorded."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, final

from anybatch import distributed
from anybatch.errors import RecipeError
from anybatch.recipe.files import format_recipe, parse_recipe
from anybatch.recipe.schema import BatchSection, Recipe
from anybatch.runs.run import Run

__all__ = [
    "RULES",
    "Change",
    "Draft",
    "Path",
    "Rule",
    "ScaledRecipe",
    "check_number",
    "format_file",
    "format_table",
    "report_changes",
]

TITLES = ("key", "old", "new", "rule", "why")

Rule = Literal["auto", "linear", "sqrt", "half-life", "none"]
RULES: tuple[Rule, ...] = ("auto", "linear", "sqrt", "half-life", "none")

Path = tuple[str | int, ...]  # keys that lead to a value

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Change:
    """Change of one key of a recipe."""

    key: str
    old: Any
    new: Any
    rule: str  # by which it was changed
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledRecipe:
    """Recipe at another batch size or with another reduction."""

    recipe: Recipe
    rule: str  # for the learning rate
    changes: list[Change]
    warnings: list[str]


@final
@dataclass
class Draft:
    """Recipe that is being changed."""

    recipe: Recipe  # before the changes
    tree: dict[str, Any] = field(init=False)
    changes: list[Change] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tree = self.recipe.model_dump()

    def get(self, path: Path) -> Any:
        """Return the value at a path; None if there is none."""
        value: Any = self.tree
        for key in path:
            value = value.get(key) if isinstance(value, dict) else value[key]
        return value

    def set(self, path: Path, new: Any, rule: str, why: str, *, default: Any = None) -> None:
        """Set one value, unless it is the same up to rounding.

        Args:
            new: the new value.
            rule, why: for the `Change`.
            default: the old value if the recipe does not state it.
        """
        *section, key = path
        old = default if self.get(path) is None else self.get(path)
        if not _is_same(old, new):
            self.get(tuple(section))[key] = new
            self.changes.append(Change(".".join(map(str, path)), old, new, rule, why))

    def map(self, path: Path, function: Callable[[Any], Any], rule: str, why: str) -> None:
        """Replace a number by a function of it, if the recipe states it."""
        old = self.get(path)
        if old is not None:
            self.set(path, function(check_number(path, old)), rule, why)

    def list_penalties(self) -> Iterator[Path]:
        """List the paths to the strengths of the penalties."""
        for number in range(len(self.get(("objective", "penalty")))):
            yield ("objective", "penalty", number, "strength")

    def finish(self, rule: str) -> ScaledRecipe:
        """Return the changed recipe."""
        recipe = parse_recipe(self.tree, "the changed recipe")
        return ScaledRecipe(recipe=recipe, rule=rule, changes=self.changes, warnings=self.warnings)


def check_number(path: Path, value: Any) -> Any:
    """Check that a value is a number or a list of numbers, and return it."""
    numbers = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers):
        raise RecipeError(f"{'.'.join(map(str, path))}: expected a number, got {value!r}.")
    return value


def _is_same(old: Any, new: Any) -> bool:
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=1e-14)
    return bool(old == new)


def report_changes(
    scaled: ScaledRecipe | None, batch: BatchSection, run: Run, *, is_new: bool
) -> None:
    """Log the changes that [batch] made to the other keys, and record them with a new run."""
    if scaled is None:
        return
    changes = [change for change in scaled.changes if change.key != "batch.size"]
    if is_new:
        numbers = {change.key: [change.old, change.new] for change in changes}
        row = {"kind": "session", "step": 0, "carried": numbers, "rule": scaled.rule}
        run.record(row | {"warnings": scaled.warnings})
    if distributed.get_rank(run.group) != 0:
        return
    text = "; ".join(f"{change.key} {change.old} -> {change.new}" for change in changes)
    _log.warning(
        f"rescaled from batch.reference_size = {batch.reference_size} to batch.size = "
        f"{batch.size} by {scaled.rule}: {text or 'nothing changes'}"
    )
    for warning in scaled.warnings if is_new else ():
        _log.warning(warning)


def format_file(scaled: ScaledRecipe) -> str:
    """Write the recipe as TOML, below a comment with the table of changes."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in format_table(scaled))
    return f"{head}\n{format_recipe(scaled.recipe, defaults=False)}"


def format_table(scaled: ScaledRecipe) -> Iterator[str]:
    """Format one line for each change, in columns, and then the warnings."""
    rows = [
        (change.key, _format_value(change.old), _format_value(change.new), change.rule, change.why)
        for change in scaled.changes
    ]
    widths = [max(map(len, column)) for column in zip(TITLES, *rows, strict=True)]
    for row in [TITLES, *rows] if rows else [("Nothing changes.",)]:
        yield "  ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=False))
    for warning in scaled.warnings:
        yield ""
        yield f"Warning: {warning}."


def _format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_format_value, value))}]"
    return "none" if value is None else str(value)
