"""What is wrong with a recipe, in words: the place, what was expected, what came."""

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from itertools import islice
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from anybatch.limits import shorten
from anybatch.recipe.names import suggest_name
from anybatch.recipe.schema import Recipe

__all__ = ["describe_mistakes"]

_MOST = 20  # lines of a message

_EXPECTED = {
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
    """A line for each place of a recipe that is not as expected."""
    mistakes: dict[str, list[Any]] = {}
    for one in error.errors():
        mistakes.setdefault(".".join(map(str, _locate(one))), []).append(one)
    lines = [
        f"  {place}: {_describe_mistake(same)}" for place, same in islice(mistakes.items(), _MOST)
    ]
    more = len(mistakes) - len(lines)
    return "\n".join([*lines, f"  and {more} more"] if more else lines)


def _describe_mistake(mistakes: list[Any]) -> str:
    """One place; a value of several possible types has a mistake for each."""
    first = mistakes[0]
    kind, came = first["type"], first["input"]
    if kind == "extra_forbidden":
        *_, (unknown, section) = _walk(first["loc"])
        return f"no such key; {_suggest_key(str(unknown), section)}"
    if kind == "missing":
        return "missing, expected in every recipe."
    if kind == "value_error":
        return str(first["ctx"]["error"])
    expected = " or ".join(_describe_expected(one) for one in mistakes)
    folded = {name.casefold(): name for one in mistakes for name in _list_choices(one)}
    near = [folded[one] for one in get_close_matches(str(came)[:200].casefold(), folded, n=1)]
    return f"expected {expected}, got {shorten(came)}" + (
        f"; did you mean {near[0]!r}?" if near else "."
    )


def _describe_expected(mistake: Any) -> str:
    known = _EXPECTED.get(mistake["type"])
    return str(mistake["msg"]) if known is None else known.format(**mistake.get("ctx", {}))


def _suggest_key(unknown: str, section: type[BaseModel]) -> str:
    """Guess which key was meant: of this section, or else of another."""
    key = SYNONYMS.get(unknown, unknown)
    if key in section.model_fields:
        return f"did you mean {key!r}?"
    for name, field in Recipe.model_fields.items():
        if _is_section(field.annotation) and key in _get_keys(field.annotation):
            return f"did you mean {f'{name}.{key}'!r}?"
    found = suggest_name(unknown, section.model_fields)
    if "args" in section.model_fields and not found.startswith("did"):
        found += f" An argument of what `name` names is written args = {{ {unknown} = ... }}."
    return found


def _get_keys(section: Any) -> Iterable[str]:
    fields: dict[str, Any] = section.model_fields
    return fields


def _list_choices(mistake: Any) -> list[str]:
    return re.findall(r"'([^']*)'", mistake.get("ctx", {}).get("expected", ""))


def _locate(mistake: Any) -> list[str | int]:
    """Where it is, without the types that pydantic has tried there."""
    unknown = mistake["loc"][-1] if mistake["type"] == "extra_forbidden" else None
    return [
        part
        for part, section in _walk(mistake["loc"])
        if isinstance(part, int) or part in section.model_fields or part == unknown
    ]


def _walk(place: Iterable[str | int]) -> Iterator[tuple[str | int, type[BaseModel]]]:
    """The parts of a place, each with the section that it is looked up in."""
    section: type[BaseModel] = Recipe
    for part in place:
        yield part, section
        if isinstance(part, str) and part in section.model_fields:
            annotation = section.model_fields[part].annotation
            section = next(filter(_is_section, (annotation, *get_args(annotation))), section)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
