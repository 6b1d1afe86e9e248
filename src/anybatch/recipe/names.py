"""From the names in a recipe to what they stand for.

A name is one of a table's, or `package.module:function` of the user's, which is imported only
where the user has said so: to read somebody's recipe must not run their code.
"""

import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from typing import Any

from anybatch.errors import AnybatchError, RecipeError

__all__ = ["called", "is_code", "looked_up"]


def is_code(name: str) -> bool:
    """Whether a name is the user's own code."""
    return ":" in name


def looked_up(
    name: str, table: Mapping[str, Callable[..., Any]], kind: str, *, allow_code: bool
) -> Callable[..., Any]:
    """The function of that name.

    Raises:
        RecipeError: an unknown name, code that may not be run, or code that cannot be imported.
    """
    if name in table:
        return table[name]
    if not is_code(name):
        near = get_close_matches(name, table, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(table))},"
        raise RecipeError(
            f"there is no {kind} {name!r}: {hint} or name your own as 'package.module:function'."
        )
    if not allow_code:
        raise RecipeError(
            f"the recipe of this run names the code {name!r} as its {kind}, which is not run "
            f"unless you say so. If you trust whoever made the run, repeat with --allow-code."
        )
    return _imported(name, kind)


def called(function: Callable[..., Any], args: Mapping[str, Any], where: str) -> Any:
    """`function(**args)`, with a mistake of the caller's explained.

    Raises:
        RecipeError: arguments that the function does not take, or that it fails on.
    """
    try:
        signature(function).bind(**args)
    except TypeError as error:
        expected = ", ".join(signature(function).parameters) or "none"
        raise RecipeError(f"{where}: {error}; expected among: {expected}.") from error
    try:
        return function(**args)
    except AnybatchError:
        raise
    except Exception as error:
        raise RecipeError(f"{where} failed: {type(error).__name__}: {error}") from error


def _imported(name: str, kind: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # code beside the recipe's user, as with `python -m`
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:
        raise RecipeError(
            f"the {kind} {name!r} cannot be imported: {type(error).__name__}: {error}. Expected "
            f"'package.module:function', importable from the folder that you are in."
        ) from error
    if not callable(found):
        raise RecipeError(f"the {kind} {name!r} is a {type(found).__name__}, expected a function.")
    return found  # type: ignore[no-any-return]
