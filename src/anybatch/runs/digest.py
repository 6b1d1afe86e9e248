"""Digest of a nested state: equal content, equal digest, whatever the device or layout.

    digest(s) = SHA-256( e(n_1) e(n_2) ... e(n_k) ),    n_1 .. n_k the nodes of s, parents first

    e(n) = type ":" length ":" content      (dtype, shape, then the elements, for a tensor)

Each e(n) says where it ends and each container how many children follow, so the stream of
bytes can be read back in one way only: 1, 1.0, True and tensor(1) differ, and so do
[1, [2]] and [[1], 2]. Dict keys are sorted by type and value; the order of insertion is
no content. Neither are `requires_grad`, strides and the device.
"""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybatch.errors import CheckpointError

__all__ = ["count_bytes", "digest", "digest_run", "refuse_non_finite", "walk_nodes"]

# Exact types: a subclass may carry content of its own, which neither the digest would see
# nor a safe load bring back.
_TENSORS = (Tensor, torch.nn.Parameter)
_DICTS = (dict, OrderedDict)
_SEQUENCES = (list, tuple)
_SCALARS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"",
    bool: lambda value: b"1" if value else b"0",
    int: lambda value: f"{value:x}".encode(),
    float: lambda value: struct.pack(">d", value),
    complex: lambda value: struct.pack(">dd", value.real, value.imag),
    str: lambda value: value.encode("utf-8", "surrogatepass"),
}
_DIVERGED = (
    "The run has probably diverged: resume from an earlier checkpoint with a smaller learning "
    "rate, or clip."
)
_MAX_DEPTH = 100  # pickle recurses
_ARRAY_CODES = "?bhilqBHILQefdFD"  # not long double: its padding bytes are arbitrary


def digest_run(state: Mapping[str, object]) -> str:
    """Compute the digest of a run's state, without the generators, which differ by machine."""
    return digest({key: value for key, value in state.items() if key != "generators"})


def digest(state: object) -> str:
    """SHA-256 over the content of a nested state.

    Args:
        state: dicts (keys str or int), lists and tuples, of strided tensors of any dtype,
            NumPy arrays and scalars, int, float, complex, bool, str and None.

    Returns:
        64 hexadecimal digits; equal for bit-equal content, so -0.0 differs from 0.0.

    Raises:
        CheckpointError: for anything else in the state, by the path of its keys.
    """
    content = hashlib.sha256()
    for path, node in walk_nodes(state):
        for part in _encode(node, path):
            content.update(part)
    return content.hexdigest()


def count_bytes(state: object) -> int:
    """Bytes of all tensors in a nested state."""
    return sum(node.nbytes for _, node in walk_nodes(state) if isinstance(node, Tensor))


def refuse_non_finite(state: object, advice: str = _DIVERGED) -> None:
    """Refuse a state whose floating tensors hold an infinity or a NaN.

    Args:
        state: as for `digest`.
        advice: the cause and what to do, for the message.

    Raises:
        CheckpointError: naming the first such tensor by the path of its keys.
    """
    for path, node in walk_nodes(state):
        if isinstance(node, Tensor) and (node.is_floating_point() or node.is_complex()):
            values = node.detach()
            if values.element_size() == 1:  # float8 has no isfinite of its own
                values = values.float()
            num_bad = int((~torch.isfinite(values)).sum())
            if num_bad:
                raise CheckpointError(
                    f"{path} holds {num_bad} infinite or NaN values out of {node.numel()}. "
                    f"All must be finite. {advice}"
                )


def walk_nodes(state: object) -> Iterator[tuple[str, Any]]:
    """The nodes of a state with their paths, parents first, children in canonical order."""
    stack: list[tuple[str, Any, int]] = [("state", state, 0)]
    while stack:
        path, node, depth = stack.pop()
        if depth > _MAX_DEPTH:
            raise CheckpointError(
                f"{path[:80]}... is nested more than {_MAX_DEPTH} levels deep. Probably the state "
                f"contains itself: save plain values instead of objects that refer to each other."
            )
        yield path, node
        children: list[tuple[Any, Any]] = []
        if type(node) in _DICTS:
            children = [(key, node[key]) for key in _sorted_keys(node, path)]
        elif type(node) in _SEQUENCES:
            children = list(enumerate(node))
        stack += [(f"{path}[{key!r}]", child, depth + 1) for key, child in reversed(children)]


def _sorted_keys(node: dict[Any, Any], path: str) -> list[Any]:
    for key in node:
        if type(key) not in (str, int):
            raise CheckpointError(
                f"{path} has the key {key!r} of type {type(key).__name__}, expected str or int. "
                f"Convert the keys before saving."
            )
    return sorted(node, key=lambda key: (type(key).__name__, key))


def _encode(node: Any, path: str) -> Iterator[bytes | memoryview]:
    """e(n) of one node, without its children."""
    kind = type(node)
    if kind in _SCALARS:
        yield _field(kind.__name__, _SCALARS[kind](node))
    elif kind in _DICTS:
        yield _field("dict", str(len(node)).encode())
        for key in _sorted_keys(node, path):
            yield _field(type(key).__name__, _SCALARS[type(key)](key))
    elif kind in _SEQUENCES:
        yield _field(kind.__name__, str(len(node)).encode())
    elif kind in _TENSORS and node.layout == torch.strided and not node.is_meta:
        yield _field("tensor", f"{node.dtype} {tuple(node.shape)}".encode())
        yield _tensor_bytes(node)
    elif _is_numpy(node) and node.dtype.char in _ARRAY_CODES:
        array = np.asarray(node, node.dtype.newbyteorder("<"))
        name = "array" if kind is np.ndarray else "scalar"
        yield _field(f"numpy {name}", f"{array.dtype.str} {array.shape}".encode())
        yield array.tobytes()
    else:
        raise _unsupported(node, path)


def _is_numpy(node: object) -> bool:
    return type(node) is np.ndarray or isinstance(node, np.generic)


def _field(kind: str, content: bytes) -> bytes:
    return f"{kind}:{len(content)}:".encode() + content


def _tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements in row-major order, copied only from another device or layout."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _unsupported(node: object, path: str) -> CheckpointError:
    what = type(node).__name__
    if isinstance(node, Tensor):
        what += f" ({node.layout}, device {node.device})"
    return CheckpointError(
        f"{path} is a {what}, which a checkpoint cannot hold: expected dicts, lists, tuples, "
        f"dense tensors, numeric arrays, numbers, strings or None. Save the object's state_dict(), "
        f"or convert it to one of these (a DTensor by full_tensor())."
    )
