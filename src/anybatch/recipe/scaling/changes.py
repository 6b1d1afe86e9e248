"""A recipe being changed key by key, with the reason for each change."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, final

from anybatch import distributed
from anybatch.errors import RecipeError
from anybatch.recipe.files import format_recipe, parse_recipe
from anybatch.recipe.schema import BatchSection, Recipe
from anybatch.training.run import Run

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

_log = logging.getLogger(__name__)

Rule = Literal["auto", "linear", "sqrt", "half-life", "none"]
RULES: tuple[Rule, ...] = ("auto", "linear", "sqrt", "half-life", "none")

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """One key of a recipe, before and after."""

    key: str
    old: Any
    new: Any
    rule: str  # by which it was changed
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledRecipe:
    """A recipe at another batch size or with another reduction."""

    recipe: Recipe
    rule: str  # of the learning rate
    changes: list[Change]
    warnings: list[str]


@final
@dataclass
class Draft:
    """The recipe as far as it is changed."""

    recipe: Recipe  # as it was
    tree: dict[str, Any] = field(init=False)
    changes: list[Change] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tree = self.recipe.model_dump()

    def at(self, path: Path) -> Any:
        """The value at a path; None where there is none."""
        found: Any = self.tree
        for part in path:
            found = found.get(part) if isinstance(found, dict) else found[part]
        return found

    def set(self, path: Path, new: Any, rule: str, why: str, *, old: Any = None) -> None:
        """Change one value, unless that would leave it as it is, up to rounding.

        Args:
            path: its place.
            new: value.
            rule, why: for the `Change`.
            old: what it was where the recipe does not state it.
        """
        *home, last = path
        old = self.at(path) if self.at(path) is not None else old
        if not _is_same(old, new):
            self.at(tuple(home))[last] = new
            self.changes.append(Change(".".join(map(str, path)), old, new, rule, why))

    def map(self, path: Path, how: Callable[[Any], Any], rule: str, why: str) -> None:
        """Change one number by a function of it, where the recipe states it.

        Raises:
            RecipeError: it is no number.
        """
        old = self.at(path)
        if old is not None:
            self.set(path, how(check_number(path, old)), rule, why)

    def finish(self, rule: str) -> ScaledRecipe:
        """The recipe as it is now."""
        recipe = parse_recipe(self.tree, "the changed recipe")
        return ScaledRecipe(recipe=recipe, rule=rule, changes=self.changes, warnings=self.warnings)

    def penalties(self) -> Iterator[Path]:
        """Where the strengths of the penalties are."""
        for number in range(len(self.at(("objective", "penalty")))):
            yield ("objective", "penalty", number, "strength")


def check_number(path: Path, value: Any) -> Any:
    """A number, or a list of numbers, as it is.

    Raises:
        RecipeError: something else.
    """
    numbers = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers):
        raise RecipeError(f"{'.'.join(map(str, path))}: expected a number, got {value!r}.")
    return value


def _is_same(old: Any, new: Any) -> bool:
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=1e-14)
    return bool(old == new)


def report_changes(
    carried: ScaledRecipe | None, batch: BatchSection, run: Run, *, is_new: bool
) -> None:
    """Show, and record with a new run, the numbers that differ from those stated; of several ranks
    the first does."""
    if carried is None:
        return
    changes = [change for change in carried.changes if change.key != "batch.size"]
    if is_new:
        numbers = {change.key: [change.old, change.new] for change in changes}
        row = {"kind": "session", "step": 0, "carried": numbers, "rule": carried.rule}
        run.record(row | {"warnings": carried.warnings})
    if distributed.rank_of(run.group) != 0:
        return
    words = "; ".join(f"{change.key} {change.old} -> {change.new}" for change in changes)
    _log.warning(
        f"carried from batch.reference_size = {batch.reference_size} to batch.size = "
        f"{batch.size} by {carried.rule}: {words or 'nothing changes'}"
    )
    for warning in carried.warnings if is_new else ():
        _log.warning(warning)


def format_file(carried: ScaledRecipe) -> str:
    """The recipe as TOML, the table as its head, keys at their defaults left out."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in format_table(carried))
    return f"{head}\n{format_recipe(carried.recipe, defaults=False)}"


def format_table(carried: ScaledRecipe) -> Iterator[str]:
    """A line for each change, in columns, and then the warnings."""
    rows = [
        (change.key, _format_value(change.old), _format_value(change.new), change.rule, change.why)
        for change in carried.changes
    ]
    widths = [max(map(len, column)) for column in zip(TITLES, *rows, strict=True)]
    for row in [TITLES, *rows] if rows else [("Nothing changes.",)]:
        yield "  ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=False))
    for warning in carried.warnings:
        yield ""
        yield f"Warning: {warning}."


def _format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_format_value, value))}]"
    return "none" if value is None else str(value)


TITLES = ("key", "old", "new", "rule", "why")
