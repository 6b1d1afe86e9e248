"""From the names in a recipe to what they stand for.

A name is one of a table's, or `package.module:function` of the user's, which is imported only
where the user has said so: to read somebody's recipe must not run their code.
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
from anybatch.recipe.code import is_code

__all__ = [
    "call_function",
    "check_signature",
    "find_function",
    "locate_user_code",
    "suggest_name",
]

_OURS = {"anybatch", "torch", "numpy", "scipy", "sklearn", "safetensors", "pydantic", "typer"}
_OURS |= {"transformers", "huggingface_hub", "datasets", "pyarrow", "rich", "tomli_w"}
_OURS |= {"plotly", "jinja2"}
_KINDS: dict[Any, str] = {
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


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Guess which name the user meant, as the end of a message.

    A name that begins or ends as typed comes before one that is spelt alike.
    """
    known, typed = sorted(known), _strip_name(name)
    plain = {_strip_name(one): one for one in known}
    near = [one for one in known if typed and _strip_name(one).startswith(typed)]
    near += [one for one in known if typed and _strip_name(one).endswith(typed)]
    near += [plain[one] for one in get_close_matches(typed, plain, n=1, cutoff=0.5)]
    if near:
        return f"did you mean {near[0]!r}?"
    return f"expected one of: {', '.join(known)}." if known else "expected none."


def _strip_name(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def find_function(
    name: str, table: Mapping[str, Callable[..., Any]], kind: str, *, allow_code: bool
) -> Callable[..., Any]:
    """The function of that name.

    Raises:
        RecipeError: an unknown name, code that may not be run, or code that cannot be imported.
    """
    if name in table:
        return table[name]
    if not is_code(name):
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
    function: Callable[..., Any], args: Mapping[str, Any], where: str, /, **given: Any
) -> Any:
    """`function(**given, **args)`, the args being the recipe's.

    An error inside the user's own function is left as it is: it is theirs to see.

    Raises:
        RecipeError: arguments that the function does not take, or that it fails on.
    """
    _check_names(function, args, where, given)
    _check_types(function, args, where)
    check_signature(function, where, **given, **args)
    try:
        return function(**given, **args)
    except (AnybatchError, MemoryError):
        raise
    except Exception as error:
        if locate_user_code(error) is not None:
            raise
        raise RecipeError(
            f"{where} = {dict(args)}: {_get_name(function)} refused them: "
            f"{type(error).__name__}: {error}"
        ) from error


def check_signature(
    function: Callable[..., Any], where: str, /, *args: str, **named: object
) -> None:
    """See that a function can be called so, as far as it tells.

    Args:
        function: what is to be called.
        where: the key of the recipe that names it.
        args: a name for each positional argument, for the message.
        named: the keyword arguments.

    Raises:
        RecipeError: it cannot.
    """
    try:
        expected = signature(function)
    except ValueError:  # some built-in functions do not tell
        return
    try:
        expected.bind(*args, **named)
    except TypeError as error:
        name, call = _get_name(function), ", ".join([*args, *(f"{key}=..." for key in named)])
        raise RecipeError(
            f"{where}: {name}{expected} cannot be called as {name}({call}): {error}."
        ) from None


def locate_user_code(error: BaseException) -> str | None:
    """File and line at which an error last passed through code that is neither ours, torch's nor
    the standard library's; None if there is no such code between us and the error."""
    place, within = None, False
    for frame, line in walk_tb(error.__traceback__):
        root = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        within = within or root == "anybatch"
        if within and root not in _OURS and root not in sys.stdlib_module_names:
            place = f"{frame.f_code.co_filename}:{line}"
    return place


def _check_names(
    function: Callable[..., Any], args: Mapping[str, Any], where: str, given: Mapping[str, Any]
) -> None:
    for name in args:
        if name in given:
            raise RecipeError(f"{where}.{name}: it is given already. Take it out of args.")
    try:
        parameters = signature(function).parameters.values()
    except ValueError:
        return
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.kind in _NAMED and p.name not in given]
    for name in args:
        if name not in known:
            raise RecipeError(f"{where}.{name}: no such argument; {suggest_name(name, known)}")


def _check_types(function: Callable[..., Any], args: Mapping[str, Any], where: str) -> None:
    """See that arguments are of the types that a function of ours or of torch declares."""
    if str(getattr(function, "__module__", "")).partition(".")[0] not in _OURS:
        return  # hints of the user's own code may be loose
    try:
        hints = get_type_hints(
            vars(function)["__init__"] if isinstance(function, type) else function
        )
    except (NameError, TypeError, KeyError, AttributeError):
        return
    for name, value in args.items():
        if name in hints and not _is_of_type(value, hints[name]):
            raise RecipeError(
                f"{where}.{name} = {value!r} is {_describe_type(value)}. It should be "
                f"{_describe_hint(hints[name])}."
            )


def _is_of_type(value: Any, hint: Any) -> bool:
    """Whether a value of TOML fits a type; a list may stand for a tuple."""
    try:
        adapter = TypeAdapter(hint, config={"strict": True, "arbitrary_types_allowed": True})
    except Exception:  # a type that pydantic cannot check
        return True
    for one in (value, _lists_to_tuples(value)):
        try:
            adapter.validate_python(one)
        except ValidationError:
            continue
        return True
    return False


def _lists_to_tuples(value: Any) -> Any:
    return tuple(map(_lists_to_tuples, value)) if isinstance(value, list) else value


def _describe_hint(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_describe_hint, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))}"
    return _KINDS.get(hint, str(getattr(hint, "__name__", hint)))


def _describe_type(value: Any) -> str:
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def _get_name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _import_function(name: str, kind: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # code beside the recipe's user, as with `python -m`
    expected = (
        "Expected 'package.module:function', in the folder of the recipe or in the folder that you "
        "are in."
    )
    try:
        home = import_module(module)
    except Exception as error:
        place = locate_user_code(error)
        at = f" at {place}" if place else ""
        raise RecipeError(
            f"the {kind} {name!r} cannot be imported: {type(error).__name__}{at}: {error}. "
            f"{expected}"
        ) from error
    if not hasattr(home, attribute):
        known = [known for known in vars(home) if not known.startswith("_")]
        raise RecipeError(
            f"the {kind} {name!r} is not there: {module} has no {attribute!r}; "
            f"{suggest_name(attribute, known)}"
        )
    found = getattr(home, attribute)
    if not callable(found):
        raise RecipeError(f"the {kind} {name!r} is a {type(found).__name__}, expected a function.")
    return found  # type: ignore[no-any-return]
