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
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from anybatch._torch import keystr, tree_flatten_with_path, tree_leaves, tree_map
from anybatch.batch_errors import describe_leaf, refuse_count, refuse_cut
from anybatch.errors import BatchError

__all__ = [
    "MicroBatches",
    "Shared",
    "Uncollated",
    "can_select",
    "copy_batch",
    "count_examples",
    "get_contents",
    "has_examples",
    "is_flat",
    "list_leaves",
    "list_sizes",
    "map_leaves",
    "name_leaves",
    "open_batch",
    "prepare_batch",
    "rebuild",
    "repeat_example",
    "select_examples",
    "sum_versions",
    "take_examples",
    "take_few",
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


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """Examples of one update that come cut into batches, as trainers hand them over.

    Each batch keeps its own padding, and goes through the model by itself. Batches are never
    collated into one. If the model draws random numbers or couples examples, each batch is a grain,
    or is cut into grains of `Objective(grain=...)` examples.

    Args:
        batches: pytrees whose leaves have the examples first; none for a rank without examples.

    Raises:
        BatchError: it names a batch without examples, or one that is cut already.

    Example:
        >>> share = MicroBatches([torch.ones(2, 7), torch.ones(3, 5)])
        >>> count_examples(share), share.sizes
        (5, (2, 3))
    """

    batches: Sequence[Any]

    def __post_init__(self) -> None:
        if not isinstance(self.batches, list | tuple):
            raise BatchError(
                f"batches is {describe_leaf(self.batches)}. MicroBatches takes the batches of one "
                f"update in a list: ab.MicroBatches([batch_0, batch_1])."
            )
        object.__setattr__(self, "batches", tuple(self.batches))
        for i, batch in enumerate(self.batches):
            if isinstance(batch, MicroBatches):
                raise BatchError(
                    f"batches[{i}] is itself MicroBatches. Pass one list with all batches."
                )
            if not count_examples(batch, f"batches[{i}]"):
                raise BatchError(f"batches[{i}] holds no examples. Leave it out of the list.")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of examples of the batches."""
        return tuple(map(count_examples, self.batches))


def list_sizes(share: Any) -> tuple[int, ...] | None:
    """List the sizes of the batches that a share comes cut into; None: it comes whole."""
    return share.sizes if isinstance(share, MicroBatches) else None


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
    if isinstance(batch, MicroBatches):
        return sum(batch.sizes)
    lengths = set()
    for leaf in list_leaves(batch):
        if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim:
            lengths.add(leaf.shape[0])
        elif has_examples(leaf):
            raise refuse_count(_name_leaves_with_examples(batch, place), place, batch)
    if len(lengths) != 1:
        raise refuse_count(_name_leaves_with_examples(batch, place), place, batch)
    return int(lengths.pop())


def _name_leaves_with_examples(batch: Any, place: str) -> list[tuple[str, Any]]:
    return [(path, leaf) for path, leaf in name_leaves(batch, place) if has_examples(leaf)]


def take_examples(batch: Any, start: int, stop: int) -> Any:
    """Take examples start .. stop-1 of a batch, as views where leaves allow; still a batch.

    A tensor that requires a gradient is cut into new leaves of the graph.

    Raises:
        BatchError: it names a sparse or nested tensor, or one with a graph behind it.
    """
    if isinstance(batch, Uncollated):
        return Uncollated(batch.examples[start:stop], batch.collate)
    if isinstance(batch, MicroBatches):
        return _take_from_pieces(batch, start, stop)

    def take(leaf: Any) -> Any:
        if not has_examples(leaf):
            return leaf
        if not isinstance(leaf, Tensor):
            return leaf[start:stop]
        if leaf.layout != torch.strided or leaf.is_nested or leaf.grad_fn is not None:
            raise refuse_cut(next(p for p, other in name_leaves(batch) if other is leaf), leaf)
        if leaf.requires_grad:
            return leaf.detach()[start:stop].requires_grad_()
        return leaf[start:stop]

    return map_leaves(take, batch)


def _take_from_pieces(share: MicroBatches, start: int, stop: int) -> Any:
    """Take examples of one piece, or of several, which stay cut."""
    pieces, first = [], 0
    for piece, size in zip(share.batches, share.sizes, strict=True):
        a, b = max(start - first, 0), min(stop - first, size)
        if a < b:
            pieces.append(piece if (a, b) == (0, size) else take_examples(piece, a, b))
        first += size
    return pieces[0] if len(pieces) == 1 else MicroBatches(pieces)


def can_select(batch: Any) -> bool:
    """Return whether `select_examples` can take any examples of a batch."""
    if isinstance(batch, Uncollated):
        return True
    leaves = [] if isinstance(batch, MicroBatches) else list_leaves(batch)
    return bool(leaves) and all(_is_array(leaf) for leaf in leaves if has_examples(leaf))


def _is_array(leaf: Any) -> bool:
    if not isinstance(leaf, Tensor):
        return isinstance(leaf, np.ndarray)
    return leaf.layout == torch.strided and not (leaf.is_nested or leaf.requires_grad)


def select_examples(batch: Any, indices: Tensor) -> Any:
    """Copy the examples of some indices [k] out of a batch, for which `can_select` is True."""
    if isinstance(batch, Uncollated):
        return Uncollated([batch.examples[i] for i in indices.tolist()], batch.collate)

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.index_select(0, indices.to(leaf.device))
        return leaf[indices.numpy()] if has_examples(leaf) else leaf

    return map_leaves(take, batch)


def take_few(share: Any, num_examples: int) -> Any:
    """Take the first examples of a share; of one that comes cut, the first of its largest batch."""
    if isinstance(share, MicroBatches) and share.batches:
        largest = max(zip(share.sizes, share.batches, strict=True), key=lambda pair: pair[0])
        return take_examples(largest[1], 0, num_examples)
    return take_examples(share, 0, num_examples)


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
    if isinstance(batch, MicroBatches):
        (batch,) = batch.batches  # the layout never joins pieces
    if type(batch) is tuple and set(map(type, batch)) == {Tensor}:
        for leaf in batch:
            if leaf.device != device or leaf.is_inference():
                break
        else:
            return batch
    return map_leaves(lambda leaf: _prepare(leaf, device), batch)


def open_batch(
    share: Any, piece: tuple[int, int] | None, device: torch.device, *, copies: bool
) -> tuple[Any, list[Any], int]:
    """Take a micro-batch out of a share, ready for a forward pass.

    Args:
        piece: its first example, and the one after its last; None: it is the share.
        copies: whether it is a copy. Another is then left as it is for another pass.

    Returns:
        The batch, and its leaves with the sum of their versions, by which writes into them are
        seen; no leaves if it is a copy.
    """
    batch = share if piece is None else take_examples(share, *piece)
    batch = prepare_batch(batch, device)
    if copies:
        return copy_batch(batch), [], 0
    leaves = list_leaves(batch)
    return batch, leaves, sum_versions(leaves)


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
