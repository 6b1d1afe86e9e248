"""Recipes as files: read, changed by `key=value`, checked, written, compared."""

import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from anybatch.errors import RecipeError
from anybatch.recipe.schema import Recipe

__all__ = ["find", "fingerprint", "parse", "read", "text_of", "with_changes"]

FREE = ("run.epochs", "run.checkpoint_every", "run.keep", "batch.micro_batch")
"""Keys that do not change arithmetic, and may therefore change on resume."""


def find(name: str) -> Path:
    """A recipe by path, or by the name of one that comes with the package.

    Raises:
        RecipeError: neither is there.
    """
    path = Path(name)
    if path.is_file():
        return path
    here = Path(__file__).parents[1]
    folders = [here / "recipes", here.parents[1] / "recipes"]  # installed, or in a checkout
    shipped = {p.stem: p for folder in folders for p in sorted(folder.glob("*.toml"))}
    if name in shipped:
        return shipped[name]
    raise RecipeError(
        f"there is no recipe {name!r}: expected the path of a TOML file, "
        f"or one of {', '.join(sorted(shipped))}."
    )


def read(path: Path, changes: Iterable[str] = ()) -> Recipe:
    """The recipe in a file, with changes of the form `section.key=value`.

    Raises:
        RecipeError: a file that is no TOML, or a key or value that is not expected.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no TOML: {error}.") from error
    for change in changes:
        _set(tree, change)
    return parse(tree, str(path))


def parse(tree: Mapping[str, Any], source: str) -> Recipe:
    """A recipe from its tree of keys; `source` is named in errors."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        words = "\n".join(f"  {_explain(dict(e))}" for e in error.errors())
        raise RecipeError(f"{source} is no valid recipe:\n{words}") from error


def with_changes(recipe: Recipe, changes: Iterable[str]) -> Recipe:
    """A recipe with some of its free keys changed, as on resume.

    Raises:
        RecipeError: a key that changes arithmetic.
    """
    tree = recipe.model_dump()
    for change in changes:
        _set(tree, change)
    changed = parse(tree, "the changed recipe")
    old, new = _flat(recipe.model_dump()), _flat(changed.model_dump())
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and key not in FREE:
            raise RecipeError(
                f"{key} is {old.get(key)!r} in this run and cannot become {new.get(key)!r}: it "
                f"changes the arithmetic. Free to change are {', '.join(FREE)}; for anything else "
                f"begin a new run."
            )
    return changed


def fingerprint(recipe: Recipe) -> str:
    """SHA-256 over the keys that change arithmetic."""
    tree = {k: v for k, v in _flat(recipe.model_dump()).items() if k not in FREE}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def text_of(recipe: Recipe) -> str:
    """The resolved recipe as TOML: every default in it; None is a key left out."""
    return tomli_w.dumps(_without_none(recipe.model_dump()))


def _set(tree: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    *path, last = key.strip().split(".")
    if not equals or not path or not last:
        raise RecipeError(f"expected --set section.key=value, got {change!r}.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word
    for name in path:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"--set {change}: {name} is a value, expected a section.")
    tree[last] = value


def _explain(error: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _keys_at(error["loc"][:-1])
        near = get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."
        return f"{place}: no such key; {hint}"
    if error["type"] == "missing":
        return f"{place}: missing, expected in every recipe."
    return f"{place}: {error['msg'].lower()}, got {error['input']!r}."


def _keys_at(place: tuple[Any, ...]) -> list[str]:
    """Names of the keys of a section."""
    section: Any = Recipe
    for name in place:
        if isinstance(name, str) and name in section.model_fields:
            annotation = section.model_fields[name].annotation
            section = next((a for a in (annotation, *get_args(annotation)) if _is(a)), section)
    return list(section.model_fields)


def _is(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_none(v) for v in value]
    return value
