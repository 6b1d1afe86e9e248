"""Find the function that a name in a recipe stands for, and call it with the recipe's arguments.

A name is one of a table, or `package.module:function` of the user's code. That code is imported
only if the user has allowed it: reading a recipe from someone else must not run their code.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from inspect import Parameter, signature
from traceback import walk_tb
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from anybatch.errors import AnybatchError, RecipeError

__all__ = ["call_function", "check_signature", "find_function", "locate_user_code", "suggest_name"]

_OURS = {"anybatch", "torch", "numpy", "scipy", "sklearn", "safetensors", "pydantic", "typer"}
_OURS |= {"transformers", "huggingface_hub", "datasets", "pyarrow", "rich", "tomli_w"}
_OURS |= {"plotly", "jinja2"}
_TYPE_NAMES: dict[Any, str] = {
    str: "text",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "a table",
    Sequence[str]: "a list of texts",
    Sequence[int]: "a list of integers",
    type(None): "left out",
}
_NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def suggest_name(name: str, choices: Iterable[str]) -> str:
    """Guess which of the choices the user meant, as the end of a message.

    A choice that begins or ends with the name comes before one that is spelt alike.

    Example:
        >>> suggest_name("epoch", ["epochs", "seed"])
        "did you mean 'epochs'?"
    """

    def simplify(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "").replace(" ", "")

    choices, typed = sorted(choices), simplify(name)
    simple = {simplify(choice): choice for choice in choices}
    near = [key for key in simple if typed and key.startswith(typed)]
    near += [key for key in simple if typed and key.endswith(typed)]
    near += get_close_matches(typed, simple, n=1, cutoff=0.5)
    if near:
        return f"did you mean {simple[near[0]]!r}?"
    return f"expected one of: {', '.join(choices)}." if choices else "expected none."


def find_function(
    name: str, table: Mapping[str, Callable[..., Any]], kind: str, *, allow_code: bool
) -> Callable[..., Any]:
    """Find a function by its name in a table, or import it from the user's code.

    Args:
        name: a name of the table, or `package.module:function`.
        table: the functions by name.
        kind: what the function makes, for messages.

    Raises:
        RecipeError: the name is unknown, or its code may not or cannot be imported.
    """
    if name in table:
        return table[name]
    if ":" not in name:
        raise RecipeError(
            f"there is no {kind} {name!r}; {suggest_name(name, table)} "
            f"Your own are named 'package.module:function'."
        )
    if not allow_code:
        raise RecipeError(
            f"the recipe of this run names the code {name!r} as its {kind}. It is imported only if "
            f"you say so. If you trust whoever made the run, repeat with --allow-code."
        )
    return _import_function(name, kind)


def call_function(
    function: Callable[..., Any], args: Mapping[str, Any], key: str, /, **objects: Any
) -> Any:
    """Call `function(**objects, **args)`.

    An error inside the user's own function is raised unchanged, so that they see it.

    Args:
        args: arguments from the recipe.
        key: key of the recipe that holds `args`, for messages.
        objects: further arguments.

    Raises:
        RecipeError: the function does not take these arguments, or fails on them.
    """
    _check_names(function, args, key, objects)
    _check_types(function, args, key)
    check_signature(function, key, **objects, **args)
    try:
        return function(**objects, **args)
    except (AnybatchError, MemoryError):
        raise
    except Exception as error:
        if locate_user_code(error) is not None:
            raise
        raise RecipeError(
            f"{key} = {dict(args)}: {_get_name(function)} refused them: "
            f"{type(error).__name__}: {error}"
        ) from error


def check_signature(function: Callable[..., Any], key: str, /, *args: str, **named: object) -> None:
    """Check that a function can be called with these arguments, as far as its signature shows.

    Args:
        key: key of the recipe that names it.
        args: a name for each positional argument, for the message.
        named: the keyword arguments.
    """
    try:
        expected = signature(function)
    except ValueError:  # some built-in functions have no signature
        return
    try:
        expected.bind(*args, **named)
    except TypeError as error:
        name, call = _get_name(function), ", ".join([*args, *(f"{name}=..." for name in named)])
        raise RecipeError(
            f"{key}: {name}{expected} cannot be called as {name}({call}): {error}."
        ) from None


def locate_user_code(error: BaseException) -> str | None:
    """Return the file and line at which an error last passed through the user's code.

    That is code called by anybatch that is neither ours, torch's nor the standard library's.

    Returns:
        "file:line", or None if there is no such code.
    """
    place, is_within = None, False
    for frame, line in walk_tb(error.__traceback__):
        root = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        is_within = is_within or root == "anybatch"
        if is_within and root not in _OURS and root not in sys.stdlib_module_names:
            place = f"{frame.f_code.co_filename}:{line}"
    return place


def _check_names(
    function: Callable[..., Any], args: Mapping[str, Any], key: str, objects: Mapping[str, Any]
) -> None:
    for name in args:
        if name in objects:
            raise RecipeError(f"{key}.{name}: anybatch sets this argument. Take it out of args.")
    try:
        parameters = signature(function).parameters.values()
    except ValueError:
        return
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
        return
    choices = [p.name for p in parameters if p.kind in _NAMED and p.name not in objects]
    for name in args:
        if name not in choices:
            raise RecipeError(f"{key}.{name}: no such argument; {suggest_name(name, choices)}")


def _check_types(function: Callable[..., Any], args: Mapping[str, Any], key: str) -> None:
    """Check arguments against the types that a function of ours or of torch declares."""
    if str(getattr(function, "__module__", "")).partition(".")[0] not in _OURS:
        return  # hints of the user's own code may be loose
    try:
        hints = get_type_hints(
            vars(function)["__init__"] if isinstance(function, type) else function
        )
    except (NameError, TypeError, KeyError, AttributeError):
        return
    for name, value in args.items():
        if name in hints and not _has_type(value, hints[name]):
            kind = _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")
            raise RecipeError(
                f"{key}.{name} = {value!r} is {kind}. It should be {_describe_type(hints[name])}."
            )


def _has_type(value: Any, hint: Any) -> bool:
    """Return whether a value of TOML fits a type. A list may stand for a tuple."""
    try:
        adapter = TypeAdapter(hint, config={"strict": True, "arbitrary_types_allowed": True})
    except Exception:  # a type that pydantic cannot check
        return True
    for candidate in (value, _lists_to_tuples(value)):
        try:
            adapter.validate_python(candidate)
        except ValidationError:
            continue
        return True
    return False


def _lists_to_tuples(value: Any) -> Any:
    return tuple(map(_lists_to_tuples, value)) if isinstance(value, list) else value


def _describe_type(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_describe_type, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))}"
    return _TYPE_NAMES.get(hint, str(getattr(hint, "__name__", hint)))


def _get_name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _import_function(name: str, kind: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # code in the current folder, as with `python -m`
    try:
        module = import_module(module_name)
    except Exception as error:
        place = locate_user_code(error)
        at = f" at {place}" if place else ""
        raise RecipeError(
            f"the {kind} {name!r} cannot be imported: {type(error).__name__}{at}: {error}. "
            f"Expected 'package.module:function', in the folder of the recipe or in the folder "
            f"that you are in."
        ) from error
    if not hasattr(module, attribute):
        choices = [choice for choice in vars(module) if not choice.startswith("_")]
        raise RecipeError(
            f"the {kind} {name!r} is not there: {module_name} has no {attribute!r}; "
            f"{suggest_name(attribute, choices)}"
        )
    function = getattr(module, attribute)
    if not callable(function):
        raise RecipeError(f"the {kind} {name!r} is a {type(function).__name__}, not a function.")
    return function  # type: ignore[no-any-return]
