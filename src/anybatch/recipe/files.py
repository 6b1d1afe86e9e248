"""Recipe files: find, read, change, check, write and compare them."""

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
from anybatch.recipe.mistakes import describe_mistakes
from anybatch.recipe.names import suggest_name
from anybatch.recipe.schema import Recipe
from anybatch.runs.run import is_run
from anybatch.shipped import recipe_files

__all__ = [
    "change_recipe",
    "find_recipe",
    "fingerprint_recipe",
    "format_recipe",
    "parse_recipe",
    "read_recipe",
]

MAX_BYTES = 2**20  # of a recipe file

_KEY = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')"""
_DOTTED = re.compile(rf"(?<![\w-]){_KEY}(?:[ \t]*+\.[ \t]*+{_KEY}){{{DEPTH},}}")

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
    "spikes.window",
    "spikes.factor",
    "track.to",
    "track.smoothing",
)
"""Keys that do not change arithmetic, and may therefore change on resume.

`stop.metric` is not free: a checkpoint holds the values of that metric so far.
"""


def find_recipe(name: str) -> Path:
    """Find a recipe by its path, or by the name of a shipped recipe.

    Example:
        >>> find_recipe("lenet-digits").name
        'lenet-digits.toml'

    Raises:
        RecipeError: there is no such recipe.
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
            f"{name} is a run. This command needs a recipe. To continue the run: anybatch resume "
            f"{name}. To start another like it: anybatch train {path / 'recipe.toml'}"
        )
    raise RecipeError(
        f"there is no recipe {name!r}: neither a TOML file of that path nor a shipped recipe of "
        f"that name; {suggest_name(name, shipped)} List them: anybatch recipes"
    )


def read_recipe(path: Path, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, with changes of the form `section.key=value`.

    Example:
        >>> read_recipe(find_recipe("lenet-digits"), ["batch.size=32"]).batch.size
        32

    Raises:
        RecipeError: the file is not TOML, or a key or value is wrong.
    """
    check_files(path, RecipeError)
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{path} is larger than {MAX_BYTES} bytes. Expected a recipe.")
    try:
        tree = _parse_toml(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise RecipeError(f"{path} is not TOML: {error}.") from error
    for change in changes:
        _set_key(tree, change)
    return parse_recipe(tree, str(path))


def _parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML text."""
    too_deep = f"it is nested deeper than {DEPTH} levels"
    if _DOTTED.search(text):  # the parser would take minutes for these
        raise ValueError(too_deep)
    try:
        tree = tomllib.loads(text)
    except RecursionError:
        raise ValueError(too_deep) from None
    if not check_depth(tree):
        raise ValueError(too_deep)
    return tree


def parse_recipe(tree: Mapping[str, Any], source: str) -> Recipe:
    """Check a tree of keys and make a recipe of it; errors name `source`.

    Raises:
        RecipeError: a key or value is wrong.
    """
    if place := check_integers(tree):
        raise RecipeError(
            f"{source} is no valid recipe:\n  {place}: expected an integer of at most 64 bits."
        )
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{source} is no valid recipe:\n{describe_mistakes(error)}") from error


def change_recipe(recipe: Recipe, changes: Iterable[str]) -> Recipe:
    """Change some of the free keys of a recipe, as on resume.

    Example:
        >>> recipe = read_recipe(find_recipe("lenet-digits"))
        >>> change_recipe(recipe, ["run.epochs=99"]).run.epochs
        99
    """
    tree = recipe.model_dump()
    for change in changes:
        _set_key(tree, change)
    changed = parse_recipe(tree, "the changed recipe")
    old, new = _flatten(recipe.model_dump()), _flatten(changed.model_dump())
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and key not in FREE:
            raise RecipeError(
                f"{key} is {old.get(key)!r} in this run and cannot become {new.get(key)!r}: it "
                f"changes the arithmetic. These keys may change: {', '.join(FREE)}. For any other "
                f"key start a new run."
            )
    return changed


def fingerprint_recipe(recipe: Recipe) -> str:
    """Compute the SHA-256 of the keys that change arithmetic.

    Keys at their defaults are left out. So a key that a later version adds does not change the
    fingerprint of an older run.
    """
    tree = recipe.model_dump(exclude_defaults=True)
    for key in FREE:
        section, _, name = key.partition(".")
        tree.get(section, {}).pop(name, None)
    tree = {section: keys for section, keys in tree.items() if keys}
    text = json.dumps(tree, sort_keys=True, default=str)  # str: TOML's dates and times
    return hashlib.sha256(text.encode()).hexdigest()


def format_recipe(recipe: Recipe, *, defaults: bool = True) -> str:
    """Write a recipe as TOML text.

    Args:
        defaults: whether to write keys that are at their defaults. A key that is None is left out.
    """
    return tomli_w.dumps(_drop_none(recipe.model_dump(exclude_defaults=not defaults)))


def _set_key(tree: dict[str, Any], change: str) -> None:
    """Apply one change `section.key=value` to a tree of keys."""
    key, equals, text = change.partition("=")
    *path, last = key.strip().split(".")
    if not equals or not path or not last:
        raise RecipeError(f"expected --set section.key=value, got {change!r}.")
    try:
        value = _parse_toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word
    except ValueError as error:
        raise RecipeError(f"--set {shorten(change)}: {error}.") from error
    for name in path:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise RecipeError(
                f"--set {change}: {name} is a value. Expected a section or table. A list is set "
                f"as a whole."
            )
    tree[last] = value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _drop_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _drop_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_drop_none(v) for v in value]
    return value
