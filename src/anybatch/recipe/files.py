"""Recipes as files: read, changed by `key=value`, checked, written, compared."""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from anybatch.errors import RecipeError
from anybatch.limits import DEPTH, check_depth, check_files, check_integers, shorten
from anybatch.paths import check_local
from anybatch.recipe.mistakes import in_words
from anybatch.recipe.names import nearest
from anybatch.recipe.schema import Recipe
from anybatch.runs.run import is_run
from anybatch.shipped import recipe_files

__all__ = ["find", "fingerprint", "parse", "read", "text_of", "with_changes"]

MOST_BYTES = 2**20
"""Of a recipe's file."""

_PART = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')"""
_DOTTED = re.compile(rf"(?<![\w-]){_PART}(?:[ \t]*+\.[ \t]*+{_PART}){{{DEPTH},}}")

FREE = (
    "run.epochs",
    "run.checkpoint_every",
    "run.keep",
    "run.compare_every",
    "run.shard",
    "run.self_check",
    "batch.micro_batch",
    "data.workers",
    "stop.better",
    "stop.target",
    "stop.patience",
    "track.to",
    "track.smoothing",
)
"""Keys that do not change arithmetic, and may therefore change on resume.

`stop.metric` is none of them: a checkpoint holds the values of that metric so far.
"""


def find(name: str) -> Path:
    """A recipe by path, or by the name of one that comes with the package.

    Raises:
        RecipeError: neither is there.
    """
    check_local(name, "the recipe", RecipeError)
    path = Path(name)
    if path.is_file():
        return path
    shipped = recipe_files()
    if name in shipped:
        return shipped[name]
    check_files(path, RecipeError)
    if is_run(path):
        raise RecipeError(
            f"{name} is a run, expected a recipe. To continue it: anybatch resume {name}. "
            f"To begin another like it: anybatch train {path / 'recipe.toml'}"
        )
    raise RecipeError(
        f"there is no recipe {name!r}: neither a TOML file of that path nor a shipped recipe of "
        f"that name; {nearest(name, shipped)} List them: anybatch recipes"
    )


def read(path: Path, changes: Iterable[str] = ()) -> Recipe:
    """The recipe in a file, with changes of the form `section.key=value`.

    Raises:
        RecipeError: a file that is no TOML, or a key or value that is not expected.
    """
    check_files(path, RecipeError)
    if path.stat().st_size > MOST_BYTES:
        raise RecipeError(f"{path} is larger than {MOST_BYTES} bytes. Expected a recipe.")
    try:
        tree = _tree(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise RecipeError(f"{path} is no TOML: {error}.") from error
    for change in changes:
        _set(tree, change)
    return parse(tree, str(path))


def _tree(text: str) -> dict[str, Any]:
    """The keys of a TOML text.

    Raises:
        ValueError: no TOML, or nested deeper than a recipe can be.
    """
    deep = f"it is nested deeper than {DEPTH} levels"
    if _DOTTED.search(text):  # which takes the parser minutes
        raise ValueError(deep)
    try:
        tree = tomllib.loads(text)
    except RecursionError:
        raise ValueError(deep) from None
    if not check_depth(tree):
        raise ValueError(deep)
    return tree


def parse(tree: Mapping[str, Any], source: str) -> Recipe:
    """A recipe from its tree of keys; `source` is named in errors."""
    if place := check_integers(tree):
        raise RecipeError(
            f"{source} is no valid recipe:\n  {place}: expected an integer of at most 64 bits."
        )
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{source} is no valid recipe:\n{in_words(error)}") from error


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
    """SHA-256 over the keys that change arithmetic, where they differ from the defaults: a key that
    a later version adds changes nothing for the runs of before."""
    tree = recipe.model_dump(exclude_defaults=True)
    for key in FREE:
        section, _, name = key.partition(".")
        tree.get(section, {}).pop(name, None)
    tree = {section: keys for section, keys in tree.items() if keys}
    text = json.dumps(tree, sort_keys=True, default=str)  # str: TOML's dates and times
    return hashlib.sha256(text.encode()).hexdigest()


def text_of(recipe: Recipe, *, defaults: bool = True) -> str:
    """The resolved recipe as TOML: every default in it, or none; None is a key left out."""
    return tomli_w.dumps(_without_none(recipe.model_dump(exclude_defaults=not defaults)))


def _set(tree: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    *path, last = key.strip().split(".")
    if not equals or not path or not last:
        raise RecipeError(f"expected --set section.key=value, got {change!r}.")
    try:
        value = _tree(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word
    except ValueError as error:
        raise RecipeError(f"--set {shorten(change)}: {error}.") from error
    for name in path:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise RecipeError(
                f"--set {change}: {name} is a value, expected a section or table. "
                f"A list is set as a whole."
            )
    tree[last] = value


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
