"""Digest of a nested state: equal content gives an equal digest, on any device.

    digest(s) = SHA-256( e(n_1) e(n_2) ... e(n_k) ),    n_1 .. n_k the nodes of s, parents first

    e(n) = type ":" length ":" content      (dtype, shape, then the elements, for a tensor)

Each e(n) states its length, and each container its number of children. So the bytes have one
reading only: 1, 1.0, True and tensor(1) differ, and so do [1, [2]] and [[1], 2]. Dict keys are
sorted by type and value. Insertion order, `requires_grad`, strides and the device do not count.
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

# Exact types: a subclass may hold content that neither the digest nor a safe load would see.
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
_MAX_DEPTH = 100  # pickle is recursive
_ARRAY_CODES = "?bhilqBHILQefdFD"  # not long double: its padding bytes are arbitrary


def digest_run(state: Mapping[str, object]) -> str:
    """Compute the digest of the part of a run's state that changes arithmetic on any machine.

    The states of global generators differ by machine, and a watch changes nothing.
    """
    return digest({key: v for key, v in state.items() if key not in ("generators", "watch")})


def digest(state: object) -> str:
    """Compute the SHA-256 of the content of a nested state.

    Args:
        state: dicts (keys str or int), lists and tuples, of strided tensors of any dtype,
            NumPy arrays and scalars, int, float, complex, bool, str and None.

    Returns:
        64 hexadecimal digits; equal for bit-equal content, so -0.0 differs from 0.0.

    Raises:
        CheckpointError: the state holds anything else; the message names its place.
    """
    content = hashlib.sha256()
    for path, node in walk_nodes(state):
        for part in _encode(node, path):
            content.update(part)
    return content.hexdigest()


def count_bytes(state: object) -> int:
    """Count the bytes of all tensors in a nested state."""
    return sum(node.nbytes for _, node in walk_nodes(state) if isinstance(node, Tensor))


def refuse_non_finite(state: object, advice: str = _DIVERGED) -> None:
    """Raise if a floating tensor of a state holds an infinity or a NaN.

    Args:
        state: as for `digest`.
        advice: the cause and what to do, for the message.

    Raises:
        CheckpointError: the message names the place of the first such tensor.
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
    """Yield the nodes of a state with their paths: parents first, children in sorted order."""
    stack: list[tuple[str, Any, int]] = [("state", state, 0)]
    while stack:
        path, node, depth = stack.pop()
        if depth > _MAX_DEPTH:
            raise CheckpointError(
                f"{path[:80]}... is nested more than {_MAX_DEPTH} levels deep. Probably the state "
                f"contains itself: save plain values in place of objects that refer to each other."
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
                f"{path} has the key {key!r} of type {type(key).__name__}. Keys must be str or "
                f"int. Convert them before saving."
            )
    return sorted(node, key=lambda key: (type(key).__name__, key))


def _encode(node: Any, path: str) -> Iterator[bytes | memoryview]:
    """Yield the bytes e(n) of one node, without its children."""
    kind = type(node)
    if kind in _SCALARS:
        yield _format_field(kind.__name__, _SCALARS[kind](node))
    elif kind in _DICTS:
        yield _format_field("dict", str(len(node)).encode())
        for key in _sorted_keys(node, path):
            yield _format_field(type(key).__name__, _SCALARS[type(key)](key))
    elif kind in _SEQUENCES:
        yield _format_field(kind.__name__, str(len(node)).encode())
    elif kind in _TENSORS and node.layout == torch.strided and not node.is_meta:
        yield _format_field("tensor", f"{node.dtype} {tuple(node.shape)}".encode())
        yield _view_bytes(node)
    elif _is_numpy(node) and node.dtype.char in _ARRAY_CODES:
        array = np.asarray(node, node.dtype.newbyteorder("<"))
        name = "array" if kind is np.ndarray else "scalar"
        yield _format_field(f"numpy {name}", f"{array.dtype.str} {array.shape}".encode())
        yield array.tobytes()
    else:
        raise _make_error(node, path)


def _is_numpy(node: object) -> bool:
    return type(node) is np.ndarray or isinstance(node, np.generic)


def _format_field(kind: str, content: bytes) -> bytes:
    return f"{kind}:{len(content)}:".encode() + content


def _view_bytes(tensor: Tensor) -> memoryview:
    """View the elements in row-major order; other devices and strides need a copy."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _make_error(node: object, path: str) -> CheckpointError:
    what = type(node).__name__
    if isinstance(node, Tensor):
        what += f" ({node.layout}, device {node.device})"
    return CheckpointError(
        f"{path} is a {what}, which a checkpoint cannot hold. It can hold dicts, lists, tuples, "
        f"dense tensors, numeric arrays, numbers, strings and None. Save the object's "
        f"state_dict(), or convert it to one of these (a DTensor by full_tensor())."
    )
