"""Nested batches: their leaves, the paths of these, and how a batch is cut.

A batch is a tensor or array, or a nesting of dicts, tuples, lists, named tuples, dataclasses and
other mappings (a `transformers.BatchEncoding`) of these. Classes that are registered as pytree
nodes of torch are opened too. Each leaf has the examples along its first dimension:

    count_examples(batch) = B,    take_examples(batch, a, b) = examples a .. b-1 of every leaf

`Shared` and None belong to all examples, and are never cut.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from anybatch._torch import keystr, tree_flatten_with_path, tree_leaves, tree_map
from anybatch.errors import BatchError

__all__ = [
    "Shared",
    "Uncollated",
    "copy_batch",
    "count_examples",
    "get_contents",
    "has_examples",
    "is_flat",
    "list_leaves",
    "map_leaves",
    "name_leaves",
    "prepare_batch",
    "rebuild",
    "repeat_example",
    "sum_versions",
    "take_examples",
    "to_native",
]


@dataclass(frozen=True, slots=True)
class Shared:
    """A leaf of a batch that belongs to all its examples, such as a mask or a table.

    Example:
        >>> batch = {"x": torch.tensor([1.0, 2.0, 3.0]), "scale": Shared(torch.tensor(10.0))}
        >>> take_examples(batch, 0, 2)
        {'x': tensor([1., 2.]), 'scale': Shared(leaf=tensor(10.))}
    """

    leaf: Any


@dataclass(frozen=True, slots=True)
class Uncollated:
    """Examples that are collated one micro-batch at a time, each to its own padding."""

    examples: Sequence[Any]
    collate: Callable[[Sequence[Any]], Any]


def is_flat(batch: Any) -> bool:
    """Return whether a batch is a tensor or a tuple of tensors. Most are, and need no walk."""
    if type(batch) is not tuple:
        return type(batch) is Tensor
    return set(map(type, batch)) == {Tensor}


def list_leaves(batch: Any) -> list[Any]:
    """List the leaves of a batch in a fixed order."""
    if type(batch) is Tensor:
        return [batch]
    if type(batch) is tuple and set(map(type, batch)) == {Tensor}:  # no tree to walk
        return list(batch)
    result: list[Any] = []
    for leaf in tree_leaves(batch, _is_packed):
        contents = get_contents(leaf)
        result += [leaf] if contents is None else list_leaves(contents)
    return result


def map_leaves(change: Callable[[Any], Any], batch: Any) -> Any:
    """Build a batch of the same structure from changed leaves."""
    if is_flat(batch):
        return tuple(map(change, batch)) if isinstance(batch, tuple) else change(batch)

    def visit(leaf: Any) -> Any:
        contents = get_contents(leaf)
        return change(leaf) if contents is None else rebuild(leaf, map_leaves(change, contents))

    return tree_map(visit, batch, is_leaf=_is_packed)


def name_leaves(batch: Any, place: str = "batch") -> Iterator[tuple[str, Any]]:
    """Yield the leaves with the expressions that reach them, such as `batch['mask']`."""
    for keys, leaf in tree_flatten_with_path(batch, _is_packed)[0]:
        path, contents = place + keystr(keys), get_contents(leaf)
        if contents is None:
            yield path, leaf
            continue
        for name, value in contents.items():
            is_attribute = not isinstance(leaf, Mapping)
            yield from name_leaves(value, f"{path}.{name}" if is_attribute else f"{path}[{name!r}]")


def has_examples(leaf: Any) -> bool:
    """Return whether a leaf holds examples: neither None nor `Shared`."""
    return leaf is not None and not isinstance(leaf, Shared)


def count_examples(batch: Any, place: str = "batch") -> int:
    """Count the examples of a batch.

    Args:
        place: the expression that errors call the batch by.

    Raises:
        BatchError: it names a leaf without examples, or leaves that disagree.
    """
    if isinstance(batch, Uncollated):
        return len(batch.examples)
    lengths = set()
    for leaf in list_leaves(batch):
        if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim:
            lengths.add(leaf.shape[0])
        elif has_examples(leaf):
            raise _refuse_count(batch, place)
    if len(lengths) != 1:
        raise _refuse_count(batch, place)
    return int(lengths.pop())


def take_examples(batch: Any, start: int, stop: int) -> Any:
    """Take examples start .. stop-1 of a batch, as views where leaves allow; still a batch.

    A tensor that requires a gradient is cut into new leaves of the graph.

    Raises:
        BatchError: it names a sparse or nested tensor, or one with a graph behind it.
    """
    if isinstance(batch, Uncollated):
        return Uncollated(batch.examples[start:stop], batch.collate)

    def take(leaf: Any) -> Any:
        if not has_examples(leaf):
            return leaf
        if not isinstance(leaf, Tensor):
            return leaf[start:stop]
        if leaf.layout != torch.strided or leaf.is_nested or leaf.grad_fn is not None:
            raise _refuse_cut(batch, leaf)
        if leaf.requires_grad:
            return leaf.detach()[start:stop].requires_grad_()
        return leaf[start:stop]

    return map_leaves(take, batch)


def repeat_example(batch: Any, example: int) -> Any:
    """Build a batch of the same shape in which every example is the one of that index."""
    if isinstance(batch, Uncollated):
        batch = batch.collate(batch.examples)
    indices = [example] * count_examples(batch)
    return map_leaves(lambda leaf: leaf[indices] if has_examples(leaf) else leaf, batch)


def prepare_batch(batch: Any, device: torch.device | None = None) -> Any:
    """Collate a batch, unwrap its `Shared` leaves, and move its tensors to the device.

    Dicts and lists are new objects: an example loss may take an entry out of its batch, as
    `batch.pop("labels")` does.
    """
    if isinstance(batch, Uncollated):
        batch = batch.collate(batch.examples)
    if type(batch) is tuple and set(map(type, batch)) == {Tensor}:
        for leaf in batch:
            if leaf.device != device or leaf.is_inference():
                break
        else:
            return batch
    return map_leaves(lambda leaf: _prepare(leaf, device), batch)


def copy_batch(batch: Any) -> Any:
    """Copy a batch: its tensors, arrays and other leaves."""
    return map_leaves(_copy_leaf, batch)


def _copy_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):  # a tensor with a graph cannot be written into
        return leaf if leaf.requires_grad else leaf.clone()
    try:
        return copy.deepcopy(leaf)
    except Exception:  # an object that cannot be copied is not watched either
        return leaf


def sum_versions(tensors: Iterable[Any]) -> int:
    """Sum the version counts of tensors; the sum grows if one of them is written into.

    Views share the count of their base. Objects that are no tensors do not count.
    """
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not tensor.is_inference():
            total += tensor._version
    return total


def _prepare(leaf: Any, device: torch.device | None) -> Any:
    """Unwrap a `Shared` leaf, move a tensor to the device, and let autograd save it."""
    if isinstance(leaf, Shared):
        return map_leaves(lambda inner: _prepare(inner, device), leaf.leaf)
    if not isinstance(leaf, Tensor):
        # Objects of the user's collate function move themselves: a PackedSequence, a graph.
        return leaf.to(device) if device is not None and hasattr(leaf, "to") else leaf
    if device is not None and leaf.device != device:
        leaf = leaf.to(device, non_blocking=True)
    return leaf.clone() if leaf.is_inference() and not torch.is_inference_mode_enabled() else leaf


def to_native(array: Any) -> Any:
    """Return an array in native byte order that torch may write to; a copy only if necessary."""
    if not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    return array if array.flags.writeable else array.copy()


def _is_packed(node: Any) -> bool:
    """Return whether a node is a named tuple whose tensors do not have the examples first."""
    return isinstance(node, PackedSequence)


def get_contents(leaf: Any) -> Mapping[str, Any] | None:
    """Return the contents by name of an object that torch takes for a leaf; None: it is one."""
    if type(leaf) is Tensor or isinstance(leaf, Tensor | np.ndarray | Shared | Uncollated | type):
        return None
    if isinstance(leaf, Mapping):
        return dict(leaf)
    if is_dataclass(leaf) and not hasattr(leaf, "rows"):  # a column that is read by row is a leaf
        return {field.name: getattr(leaf, field.name) for field in fields(leaf)}
    return None


def rebuild(original: Any, contents: Mapping[str, Any]) -> Any:
    """Build an object like the original from other contents.

    Attributes of a dataclass that are not fields are left out. They may have been computed from
    the whole batch, such as those of `cached_property`.
    """
    kind: Any = type(original)
    if isinstance(original, Mapping):
        try:
            return kind(contents)
        except TypeError as error:
            raise BatchError(
                f"A {kind.__name__} in the batch cannot be made from a dict: {error}. Pass a dict "
                f"of its tensors."
            ) from error
    new = object.__new__(kind)
    for name, value in contents.items():
        object.__setattr__(new, name, value)
    return new


def _refuse_count(batch: Any, place: str) -> BatchError:
    """Make the error for a batch whose examples cannot be counted."""
    leaves = [(path, leaf) for path, leaf in name_leaves(batch, place) if has_examples(leaf)]
    if not leaves:
        return BatchError(
            f"The {place}, of type {_name_type(batch)}, holds no tensor and no array. Pass tensors "
            f"that have the examples as their first dimension, alone or in a dict, tuple or "
            f"dataclass."
        )
    first: dict[int, str] = {}
    for path, leaf in leaves:
        if not (isinstance(leaf, Tensor | np.ndarray) and leaf.ndim):
            return BatchError(f"{path} is {_describe(leaf)}. {_advise(path, leaf)}")
        first.setdefault(leaf.shape[0], path)
    counts = ", ".join(f"{path} has {n}" for n, path in [*first.items()][:4])
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
        return f"the number {leaf} ({_name_type(leaf)})"
    return f"of type {_name_type(leaf)}"


def _advise(place: str, leaf: Any) -> str:
    """Say what to do about a leaf without examples."""
    is_in_list = place.endswith("]") and not place.endswith("']")
    if isinstance(leaf, str | bytes) and is_in_list:
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


def _name_type(thing: Any) -> str:
    kind = type(thing)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )
