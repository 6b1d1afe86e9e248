"""Functions of torch that are written in Python, and hand themselves to a mode as a whole.

Their bodies, without that first look for modes, run under a mode like a model's own code.
"""

import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

__all__ = ["WAYS_BACK", "body", "is_composite"]

WAYS_BACK = (torch.Tensor.backward, torch.autograd.backward)
"""What begins a backward pass."""
_LOOKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def is_composite(func: Any) -> bool:
    """Whether it is such a function."""
    return isinstance(func, types.FunctionType) and not {*_LOOKS}.isdisjoint(func.__code__.co_names)


@cache
def body(func: Any) -> Callable[..., Any]:
    """The function without its look for modes."""
    seen = {**func.__globals__, **dict.fromkeys(_LOOKS, lambda *_: False)}
    bare = types.FunctionType(
        func.__code__, seen, func.__name__, func.__defaults__, func.__closure__
    )
    bare.__kwdefaults__ = func.__kwdefaults__
    return bare
