"""Messages about a wrong recipe: the place, what is expected there, and what was found."""

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from itertools import islice
from typing import Any, TypeGuard, get_args

from pydantic import BaseModel, ValidationError

from anybatch.limits import shorten
from anybatch.recipe.names import suggest_name
from anybatch.recipe.schema import Recipe

__all__ = ["describe_mistakes"]

_MAX_LINES = 20

_EXPECTED = {  # by pydantic's type of error
    "bool_type": "true or false",
    "dict_type": "a table {{key = value}}",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_type": "an integer",
    "less_than": "a number below {lt:g}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_type": "a section [...]",
    "string_type": "a string",
}

SYNONYMS = {
    "learning_rate": "lr",
    "batch_size": "size",
    "microbatch": "micro_batch",
    "num_epochs": "epochs",
    "criterion": "loss",
    "random_seed": "seed",
    "l2": "penalty",
    "weight_decay": "penalty",
    "grad_clip": "clip_norm",
    "max_grad_norm": "clip_norm",
    "test_size": "held_out",
    "val": "validation",
    "valid": "validation",
}
"""Keys of other tools, and the key of a recipe that means the same."""


def describe_mistakes(error: ValidationError) -> str:
    """Describe each wrong place of a recipe on one line."""
    mistakes: dict[str, list[Any]] = {}  # a value of several possible types has one for each
    for mistake in error.errors():
        mistakes.setdefault(".".join(map(str, _locate(mistake))), []).append(mistake)
    lines = [
        f"  {place}: {_describe_mistake(same_place)}"
        for place, same_place in islice(mistakes.items(), _MAX_LINES)
    ]
    num_left = len(mistakes) - len(lines)
    return "\n".join([*lines, f"  and {num_left} more"] if num_left else lines)


def _describe_mistake(mistakes: list[Any]) -> str:
    first = mistakes[0]
    kind, value = first["type"], first["input"]
    if kind == "extra_forbidden":
        *_, (key, section) = _walk(first["loc"])
        return f"no such key; {_suggest_key(str(key), section)}"
    if kind == "missing":
        return "missing. Every recipe needs it."
    if kind == "value_error":
        return str(first["ctx"]["error"])
    expected = " or ".join(map(_describe_expected, mistakes))
    choices = {name.casefold(): name for one in mistakes for name in _list_choices(one)}
    near = get_close_matches(str(value)[:200].casefold(), choices, n=1)
    end = f"; did you mean {choices[near[0]]!r}?" if near else "."
    return f"expected {expected}, got {shorten(value)}{end}"


def _describe_expected(mistake: Any) -> str:
    text = _EXPECTED.get(mistake["type"])
    return str(mistake["msg"]) if text is None else text.format(**mistake.get("ctx", {}))


def _suggest_key(key: str, section: type[BaseModel]) -> str:
    """Guess which key was meant: of this section, or else of another."""
    synonym = SYNONYMS.get(key, key)
    if synonym in section.model_fields:
        return f"did you mean {synonym!r}?"
    for name, field in Recipe.model_fields.items():
        if _is_section(field.annotation) and synonym in field.annotation.model_fields:
            return f"did you mean {f'{name}.{synonym}'!r}?"
    suggestion = suggest_name(key, section.model_fields)
    if "args" in section.model_fields and not suggestion.startswith("did"):
        suggestion += f" An argument of what `name` names is written args = {{ {key} = ... }}."
    return suggestion


def _list_choices(mistake: Any) -> list[str]:
    return re.findall(r"'([^']*)'", mistake.get("ctx", {}).get("expected", ""))


def _locate(mistake: Any) -> list[str | int]:
    """List the keys that lead to a mistake, without the types that pydantic has tried there."""
    unknown = mistake["loc"][-1] if mistake["type"] == "extra_forbidden" else None
    return [
        key
        for key, section in _walk(mistake["loc"])
        if isinstance(key, int) or key in section.model_fields or key == unknown
    ]


def _walk(keys: Iterable[str | int]) -> Iterator[tuple[str | int, type[BaseModel]]]:
    """Pair each key of a place with the section that it is looked up in."""
    section: type[BaseModel] = Recipe
    for key in keys:
        yield key, section
        if isinstance(key, str) and key in section.model_fields:
            annotation = section.model_fields[key].annotation
            section = next(filter(_is_section, (annotation, *get_args(annotation))), section)


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
