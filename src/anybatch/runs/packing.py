"""Convert values to forms that torch loads without running code, and back.

    unpack(pack(x)) = x

Tensors, numbers, strings, lists, tuples and dicts with plain keys stay unchanged. Another type
becomes a dict with its name: a set becomes {"packed": "set", "content": [...]}.
"""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anybatch.errors import CheckpointError, RunError
from anybatch.runs.digest import digest

__all__ = ["pack", "unpack"]

_NAME, _CONTENT, _FACTORY = "packed", "content", "factory"
_PLAIN = (type(None), bool, int, float, complex, str)
_FACTORIES = {kind.__name__: kind for kind in (int, float, complex, str, bool, list, dict, set)}
_MAPPINGS = {kind.__name__: kind for kind in (dict, OrderedDict, Counter, defaultdict)}
_ARRAY_CODES = "?bhilqBHILQefdFDMm"  # no objects; no long double, whose padding bytes are arbitrary
_MAX_DEPTH = 100


class _Form(NamedTuple):
    """Conversion of a type to plain values, and back."""

    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]


def _pack_array(array: Any) -> list[Any]:
    kind = array.dtype.newbyteorder("<")
    return [kind.str, list(array.shape), np.asarray(array, kind).tobytes().decode("latin-1")]


def _unpack_array(content: Any) -> Any:
    kind, shape, data = content
    array = np.frombuffer(data.encode("latin-1"), kind).reshape(shape)
    return array.astype(array.dtype.newbyteorder("="))  # a copy, since frombuffer is read-only


_FORMS: dict[str, _Form] = {
    "deque": _Form(
        lambda value: [value.maxlen, list(value)], lambda content: deque(content[1], content[0])
    ),
    "set": _Form(list, set),
    "frozenset": _Form(list, frozenset),
    "Size": _Form(list, torch.Size),
    "range": _Form(lambda r: [r.start, r.stop, r.step], lambda content: range(*content)),
    "bytes": _Form(lambda b: b.decode("latin-1"), lambda text: text.encode("latin-1")),
    "bytearray": _Form(
        lambda b: b.decode("latin-1"), lambda text: bytearray(text.encode("latin-1"))
    ),
    "dtype": _Form(str, lambda text: getattr(torch, text.removeprefix("torch."))),
    "device": _Form(str, torch.device),
    "ndarray": _Form(_pack_array, _unpack_array),
    "scalar": _Form(_pack_array, lambda content: _unpack_array(content)[()]),
}
_TYPES: dict[type, str] = {
    kind: kind.__name__
    for kind in (
        *(deque, set, frozenset, range, bytes, bytearray),
        *(np.ndarray, torch.Size, torch.dtype, torch.device),
    )
}


def pack(value: Any, place: str = "state", depth: int = 0) -> Any:
    """Convert a nested value to the form that a checkpoint holds.

    Args:
        place: the expression that names the value in errors.
        depth: number of containers around the value.

    Raises:
        RunError: the value has another type, or contains itself; the message names the place.
    """
    if depth > _MAX_DEPTH:
        raise RunError(
            f"{place[:80]}... is nested more than {_MAX_DEPTH} levels deep. Probably it contains "
            f"itself. Keep plain values in place of objects that refer to each other."
        )
    kind = type(value)
    if kind in _PLAIN or _is_dense(value):
        return value
    if kind in (list, tuple):
        return kind(pack(v, f"{place}[{i}]", depth + 1) for i, v in enumerate(value))
    if kind in _MAPPINGS.values():
        return _pack_mapping(value, place, depth)
    name = _name_form(value)
    if name is None:
        raise _make_error(value, place)
    content = pack(_FORMS[name].pack(value), place, depth + 1)
    if name in ("set", "frozenset"):  # iteration order differs between processes
        content = sorted(content, key=digest)
    return {_NAME: name, _CONTENT: content}


def unpack(value: Any) -> Any:
    """Convert a packed value back."""
    if type(value) in (list, tuple):
        return type(value)(unpack(inner) for inner in value)
    if not isinstance(value, dict):
        return value
    if _NAME not in value:
        return type(value)((key, unpack(inner)) for key, inner in value.items())
    try:
        name, content = value[_NAME], unpack(value[_CONTENT])
        if name in _MAPPINGS:
            return _unpack_mapping(_MAPPINGS[name], content, value.get(_FACTORY))
        return _FORMS[name].unpack(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"The checkpoint holds a packed value of the type {value[_NAME]!r} that cannot be "
            f"read: {error!r}. Was it written by a newer version of anybatch?"
        ) from error


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def _pack_mapping(mapping: Any, place: str, depth: int) -> dict[Any, Any]:
    kind = type(mapping)
    pairs = [(key, pack(v, f"{place}[{key!r}]", depth + 1)) for key, v in mapping.items()]
    is_plain = all(type(key) in (str, int) for key in mapping) and _NAME not in mapping
    if kind in (dict, OrderedDict) and is_plain:
        return kind(pairs)
    keyed = [[pack(key, f"the key {key!r} of {place}", depth + 1), v] for key, v in pairs]
    packed: dict[Any, Any] = {_NAME: kind.__name__, _CONTENT: keyed}
    if kind is defaultdict:
        packed[_FACTORY] = _name_factory(mapping.default_factory, place)
    return packed


def _unpack_mapping(kind: Any, pairs: Iterable[Any], factory: str | None) -> Any:
    mapping = kind() if factory is None else kind(_FACTORIES[factory])
    for key, value in pairs:
        mapping[key] = value
    return mapping


def _name_factory(factory: Any, place: str) -> str | None:
    if factory is None or factory in _FACTORIES.values():
        return None if factory is None else str(factory.__name__)
    raise RunError(
        f"{place} is a defaultdict of {factory!r}, and a checkpoint holds no function. Use a type "
        f"such as float or list in place of it, or keep dict(...)."
    )


def _name_form(value: Any) -> str | None:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.char not in _ARRAY_CODES:
        return None
    return "scalar" if isinstance(value, np.generic) else _TYPES.get(type(value))


def _make_error(value: Any, place: str) -> RunError:
    kind = type(value).__qualname__
    if isinstance(value, Tensor):
        kind += f" ({value.layout}, device {value.device})"
    elif isinstance(value, np.ndarray | np.generic):
        kind += f" of {value.dtype}"
    advice = "Keep its content as numbers, strings, tensors, lists or dicts of these."
    if callable(getattr(value, "state_dict", None)):
        advice = "Keep its state_dict() there, and load that in load_state_dict()."
    return RunError(f"{place} is a {kind}, which a checkpoint cannot hold. {advice}")
