"""Nested states to draw, and their equality bit by bit: the oracle of digests and round trips.

`same` compares structures side by side; it hashes nothing and shares no code with the library.
"""

import struct

import torch
from hypothesis import strategies as st

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.uint8,
    torch.bool,
]


def same(left, right):
    """Return whether two states have the same types, structure and bits."""
    kinds = [dict if isinstance(side, dict) else type(side) for side in (left, right)]
    if kinds[0] is not kinds[1]:
        return False
    if isinstance(left, dict):
        # 1 == True and 1 == 1.0 as keys: compare them with their types
        keys = [{(type(key), key) for key in side} for side in (left, right)]
        return keys[0] == keys[1] and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return (left.dtype, left.shape) == (right.dtype, right.shape) and bits(left) == bits(right)
    if isinstance(left, float):
        return struct.pack("=d", left) == struct.pack("=d", right)
    return left == right


def bits(tensor):
    """Return the bits of each element in row-major order."""
    return [bytes(item.reshape(1).view(torch.uint8).tolist()) for item in tensor.reshape(-1)]


@st.composite
def tensors(draw):
    """A tensor of any bits, also NaN and -0.0, sometimes not contiguous."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.sampled_from([(), (0,), (1,), (3,), (2, 3), (2, 0, 2)]))
    size = torch.empty(shape, dtype=dtype).nbytes
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    if not size:
        return torch.empty(shape, dtype=dtype)
    tensor = torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
    return tensor.t() if tensor.dim() == 2 and draw(st.booleans()) else tensor


def scalars():
    """Plain values, chosen so that equal and nearly equal ones meet often."""
    meeting = st.sampled_from([0, 1, -1, 0.0, -0.0, 1.0, True, False, None, "", "1", "a"])
    return meeting | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)


def keys():
    """Keys of dicts."""
    return st.sampled_from(["a", "b", "1", ""]) | st.integers(-2, 2)


def states():
    """Nested dicts, lists and tuples of tensors and plain values."""

    def grown(inner):
        lists = st.lists(inner, max_size=3)
        return lists | lists.map(tuple) | st.dictionaries(keys(), inner, max_size=3)

    return st.recursive(scalars() | tensors(), grown, max_leaves=6)
