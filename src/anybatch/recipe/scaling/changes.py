"""A recipe being changed key by key, with the reason for each change."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, final

from anybatch.errors import RecipeError
from anybatch.recipe.files import parse
from anybatch.recipe.schema import Recipe

__all__ = ["RULES", "Carried", "Change", "Draft", "Path", "Rule", "numeric"]

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
class Carried:
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
            self.set(path, how(numeric(path, old)), rule, why)

    def carried(self, rule: str) -> Carried:
        """The recipe as it is now."""
        recipe = parse(self.tree, "the changed recipe")
        return Carried(recipe=recipe, rule=rule, changes=self.changes, warnings=self.warnings)

    def penalties(self) -> Iterator[Path]:
        """Where the strengths of the penalties are."""
        for number in range(len(self.at(("objective", "penalty")))):
            yield ("objective", "penalty", number, "strength")


def numeric(path: Path, value: Any) -> Any:
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
