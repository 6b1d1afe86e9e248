"""Nested batches: their leaves, their paths, and how they are cut.

A batch is a tensor or array, or a nesting of dicts, tuples, lists, named tuples, dataclasses and
other mappings (a `transformers.BatchEncoding`) of these. A class that is registered as a pytree
node of torch is opened too. Each leaf has the examples along its first dimension:

    size = B,    piece(leaf, a, b) = examples a .. b-1 of the leaf

`Shared` and None are left whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from anybatch.errors import BatchError

__all__ = [
    "Shared",
    "Uncollated",
    "cut",
    "is_cut",
    "is_flat",
    "leaves",
    "length",
    "map_leaves",
    "name_leaves",
    "native",
    "parts_of",
    "rebuild",
]


@dataclass(frozen=True, slots=True)
class Shared:
    """A leaf of a batch that belongs to all its examples, such as a mask or a table."""

    leaf: Any


@dataclass(frozen=True, slots=True)
class Uncollated:
    """Examples that are collated a micro-batch at a time, to its own padding for instance."""

    examples: Sequence[Any]
    collate: Callable[[Sequence[Any]], Any]


_TENSORS = {Tensor}


def is_flat(batch: Any) -> bool:
    """Whether a batch is a tensor or a tuple of tensors, which most are: no tree to walk."""
    if type(batch) is not tuple:
        return type(batch) is Tensor
    return {*map(type, batch)} <= _TENSORS  # quick: it is asked several times an update


def leaves(batch: Any) -> list[Any]:
    """List the leaves of a batch in a fixed order."""
    if is_flat(batch):
        return list(batch) if isinstance(batch, tuple) else [batch]
    found: list[Any] = []
    for leaf in tree_leaves(batch, _is_packed):
        parts = parts_of(leaf)
        found += [leaf] if parts is None else leaves(parts)
    return found


def map_leaves(change: Callable[[Any], Any], batch: Any) -> Any:
    """Build a batch of the same structure from changed leaves."""
    if is_flat(batch):
        return tuple(map(change, batch)) if isinstance(batch, tuple) else change(batch)

    def visit(leaf: Any) -> Any:
        parts = parts_of(leaf)
        return change(leaf) if parts is None else rebuild(leaf, map_leaves(change, parts))

    return tree_map(visit, batch, is_leaf=_is_packed)


def name_leaves(batch: Any, place: str = "batch") -> Iterator[tuple[str, Any]]:
    """Yield the leaves with the expressions that reach them, such as `batch['mask']`."""
    for keys, leaf in tree_flatten_with_path(batch, _is_packed)[0]:
        path, parts = place + keystr(keys), parts_of(leaf)
        if parts is None:
            yield path, leaf
            continue
        for name, part in parts.items():
            is_attribute = not isinstance(leaf, Mapping)
            yield from name_leaves(part, f"{path}.{name}" if is_attribute else f"{path}[{name!r}]")


def is_cut(leaf: Any) -> bool:
    """Whether a leaf holds examples: neither None nor `Shared`."""
    return leaf is not None and not isinstance(leaf, Shared)


def length(batch: Any, place: str = "batch") -> int:
    """Count the examples of a batch.

    Args:
        place: the expression that errors call it by.

    Raises:
        BatchError: it names a leaf without examples, or leaves that disagree.
    """
    lengths = {_length(leaf) for leaf in leaves(batch) if is_cut(leaf)}
    if len(lengths) == 1 and (found := lengths.pop()) is not None:
        return found
    raise _refuse(batch, place)


def cut(batch: Any, start: int, stop: int) -> Any:
    """Take examples start .. stop-1 of a batch, as views where leaves allow.

    A tensor that requires a gradient is cut into leaves of the graph of their own.

    Raises:
        BatchError: it names a sparse or nested tensor, or one with a graph behind it.
    """

    def piece(leaf: Any) -> Any:
        if not is_cut(leaf):
            return leaf
        if not isinstance(leaf, Tensor):
            return leaf[start:stop]
        if leaf.layout != torch.strided or leaf.is_nested or leaf.grad_fn is not None:
            raise _refuse_cut(batch, leaf)
        if leaf.requires_grad:
            return leaf.detach()[start:stop].requires_grad_()
        return leaf[start:stop]

    return map_leaves(piece, batch)


def native(array: Any) -> Any:
    """Return an array in this machine's byte order that torch may write to, a copy if need be."""
    if not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    return array if array.flags.writeable else array.copy()


def _is_packed(node: Any) -> bool:
    """Whether a node is a named tuple whose tensors do not have the examples first."""
    return isinstance(node, PackedSequence)


def parts_of(leaf: Any) -> Mapping[str, Any] | None:
    """Contents by name of an object that torch takes for a leaf though it holds leaves."""
    if type(leaf) is Tensor or isinstance(leaf, Tensor | np.ndarray | Shared | Uncollated | type):
        return None
    if isinstance(leaf, Mapping):
        return dict(leaf)
    if is_dataclass(leaf) and not hasattr(leaf, "rows"):  # a column that is read by row is a leaf
        return {field.name: getattr(leaf, field.name) for field in fields(leaf)}
    return None


def rebuild(original: Any, parts: Mapping[str, Any]) -> Any:
    """Build an object like the original from other contents.

    Attributes beside the fields of a dataclass are left out: they may have been computed from the
    whole batch, such as those of `cached_property`.
    """
    kind: Any = type(original)
    if isinstance(original, Mapping):
        try:
            return kind(parts)
        except TypeError as error:
            raise BatchError(
                f"A {kind.__name__} in the batch cannot be made from a dict: {error}. Pass a dict "
                f"of its tensors."
            ) from error
    new = object.__new__(kind)
    for name, part in parts.items():
        object.__setattr__(new, name, part)
    return new


def _length(leaf: Any) -> int | None:
    """First dimension of a tensor or array; None for everything else."""
    if isinstance(leaf, Tensor):
        return leaf.size(0) if leaf.dim() else None
    if isinstance(leaf, np.ndarray) and leaf.ndim:
        return len(leaf)
    return None


def _refuse(batch: Any, place: str) -> BatchError:
    """Make the error for a batch whose examples cannot be counted."""
    named = [(path, leaf) for path, leaf in name_leaves(batch, place) if is_cut(leaf)]
    if not named:
        return BatchError(
            f"The {place}, of type {_type(batch)}, holds no tensor and no array. Pass tensors that "
            f"have the examples as their first dimension, alone or in a dict, tuple or dataclass."
        )
    first: dict[int, str] = {}
    for path, leaf in named:
        if (found := _length(leaf)) is None:
            return BatchError(f"{path} is {_describe(leaf)}. {_advise(path, leaf)}")
        first.setdefault(found, path)
    counts = ", ".join(f"{path} has {count}" for count, path in [*first.items()][:4])
    advice = "Stack or pad tensors that are one example each."
    if place == "batch":
        advice += " Wrap a tensor that belongs to the whole batch in ab.Shared(...)."
    return BatchError(
        f"The leaves of the {place} hold different numbers of examples: {counts}. Each must have "
        f"the examples as its first dimension. {advice}"
    )


def _describe(leaf: Any) -> str:
    if isinstance(leaf, Tensor | np.ndarray):
        return f"a {'tensor' if isinstance(leaf, Tensor) else 'NumPy array'} of shape ()"
    if isinstance(leaf, Number):
        return f"the number {leaf} ({_type(leaf)})"
    return f"of type {_type(leaf)}"


def _advise(place: str, leaf: Any) -> str:
    """Say what to do about a leaf without examples."""
    is_listed = place.endswith("]") and not place.endswith("']")
    if isinstance(leaf, str | bytes) and is_listed:
        return (
            "A list of strings cannot be cut into micro-batches. Turn the strings into tensors, by "
            "a tokenizer in collate=... for instance, or put them into one array, np.array(texts)."
        )
    if isinstance(leaf, Number | str | bytes | Tensor | np.ndarray):
        advice = (
            "Every leaf must have the examples as its first dimension. Make the values of the "
            "examples one tensor of shape [B]."
        )
        shared = " Wrap a value that belongs to the whole batch in ab.Shared(...)."
        return advice + shared if place.startswith("batch") else advice
    if isinstance(leaf, set | frozenset | Iterator | range):
        return "It cannot be indexed by example. Make it a tensor, torch.tensor(list(...))."
    return (
        "The library cannot find the tensors in it. Pass them in a dict, a tuple or a dataclass. "
        "To batch such objects, give ab.steps a list of examples and collate=..., which is called "
        "for each micro-batch."
    )


def _refuse_cut(batch: Any, leaf: Tensor) -> BatchError:
    """Make the error for a tensor that cannot be cut into micro-batches."""
    place = next(place for place, other in name_leaves(batch) if other is leaf)
    if leaf.grad_fn is not None:
        return BatchError(
            f"{place} has a graph behind it ({leaf.grad_fn.name()}), which the backward passes of "
            f"several micro-batches would go through more than once. Compute it in example_losses, "
            f"detach() it, or pass the batch whole, with micro_batch=None."
        )
    kind = "a nested tensor" if leaf.is_nested else f"a sparse tensor ({leaf.layout})"
    return BatchError(
        f"{place} is {kind}, which cannot be cut into micro-batches. Make it dense by "
        f"{'to_padded_tensor(0)' if leaf.is_nested else 'to_dense()'}, or pass the batch whole, "
        f"with micro_batch=None."
    )


def _type(thing: Any) -> str:
    kind = type(thing)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )
