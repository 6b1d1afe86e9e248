"""Operations of torch by the fastest kernels: the same values and gradients, up to rounding.

    y = x W^T + b,      dL/dx = d W,    dL/dW = d^T x,    dL/db = sum of d over rows,    d = dL/dy

and max pooling, bit for bit: on a CPU torch is quicker with channels last in memory, and what it
says of each winner is all that the way back needs.

Which way an operation goes follows from its sizes and from what has been measured, never from what
was computed before: a run that is resumed computes as one that was not stopped.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anybatch._torch import DisableTorchFunction, unsafe_view
from anybatch.kernels import choice
from anybatch.kernels.choice import SMALL, chosen, fastest, is_plain, pays, product, product_of

__all__ = ["FASTER", "Faster", "fastest_kernels", "linear", "max_pool2d"]

_spared: WeakKeyDictionary[nn.Module, set[Hashable]] = WeakKeyDictionary()


_WORTH = 2**27
"""Multiplications below which a linear layer's node in Python costs what its products gain."""


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """`torch.nn.functional.linear`; None: there is no choice, or torch's kernels are the best."""
    if input.ndim < 2 or not pays(input, weight) or torch.is_autocast_enabled("cpu"):
        return None
    d, p = input.shape[-1], len(weight)
    n = input.numel() // d
    if n * d * p < _WORTH:
        return None
    products = [("nn", bias, (n, d, p))]
    if input.requires_grad:
        products.append(("nt", None, (n, p, d)))
    if weight.requires_grad:
        products.append(("tt", None, (p, n, d)))
    if all(_way(input, *product) == "torch" for product in products):
        return None
    output: Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return output


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    """`torch.nn.functional.max_pool2d`; None: there is no choice, or torch's is the best."""
    if return_indices or input.ndim != 4 or input.numel() < SMALL or not is_plain(input):
        return None
    if not input.is_contiguous():  # channels last already
        return None
    how = _pair(kernel_size), _pair(stride or kernel_size), _pair(padding), _pair(dilation)
    sizes = (*input.shape, *how[0])
    if chosen("max_pool2d", input, sizes) is None:
        _pooled(input.detach(), how, ceil_mode)
    if chosen("max_pool2d", input, sizes) == "torch":
        return None
    output: Tensor = _MaxPool2d.apply(input, how, ceil_mode)  # type: ignore[no-untyped-call]
    return output


FASTER: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.linear: linear,
    F.max_pool2d: max_pool2d,
}
"""What may take the place of an operation."""


class Faster(TorchFunctionMode):
    """While it is entered, operations go by the fastest kernels.

    `is_of_use` tells afterwards whether any has gone by another than torch's: a mode costs some
    microseconds for each operation, which other models are spared.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_of_use = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        faster = FASTER.get(func)
        found = None if faster is None else faster(*args, **kwargs)
        if found is None:
            return func(*args, **kwargs)
        self.is_of_use = True
        return found


def fastest_kernels(model: nn.Module, *how: Hashable) -> AbstractContextManager[object]:
    """What to enter for a forward pass of a model, of so many examples in such a mode.

    Nothing once a pass alike has had no use for it, which changes no bit of what follows.
    """
    if not choice.has_choice() or type(model).__name__ == "OptimizedModule":
        return nullcontext()
    spared = _spared.setdefault(model, set())
    return nullcontext() if how in spared else _Tried(spared, how)


class _Tried(Faster):
    """Notes where it was of no use."""

    def __init__(self, spared: set[Hashable], how: Hashable) -> None:
        super().__init__()
        self._spared, self._how = spared, how

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if error[0] is None and not self.is_of_use:
            self._spared.add(self._how)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w)
        y = product(_rows(x), w, bias)
        output: Tensor = unsafe_view(y, [*x.shape[:-1], len(w)])
        return output

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        needs_x, needs_w, needs_bias = ctx.needs_input_grad
        with DisableTorchFunction():  # no mode has anything to see here
            (x, w), rows = ctx.saved_tensors, _rows(d)
            # Only torch's kernel has a derivative, which create_graph=True asks for.
            times = F.linear if torch.is_grad_enabled() else product
            return (
                times(rows, w.T).view(*d.shape[:-1], -1) if needs_x else None,
                times(rows.T, _rows(x).T) if needs_w else None,
                rows.sum(0) if needs_bias else None,
            )


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Sequence[Any], ceil_mode: bool) -> Tensor:
        output, places = _pooled(x, how, ceil_mode)
        ctx.how = (*how, ceil_mode)
        ctx.save_for_backward(x, places)
        return output

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        x, places = ctx.saved_tensors
        back = torch.ops.aten.max_pool2d_with_indices_backward
        return back(d.contiguous(), x, *ctx.how, places), None, None


def _way(like: Tensor, strides: str, bias: Tensor | None, sizes: tuple[int, int, int]) -> str:
    """That of a product, measured now if it has not been."""
    what, (n, d, p) = product_of(strides, bias), sizes
    if chosen(what, like, sizes) is None:
        x, w = like.new_ones(n, d), like.new_ones(p, d)
        if "t" in strides:
            w = like.new_ones(d, p).T
        if strides == "tt":
            x = like.new_ones(d, n).T
        product(x, w, None if bias is None else bias.detach())
    return chosen(what, like, sizes) or "torch"


def _pooled(x: Tensor, how: Sequence[Any], ceil_mode: bool) -> tuple[Tensor, Tensor]:
    """Maxima and where they were."""

    def last() -> tuple[Tensor, Tensor]:
        images = x.contiguous(memory_format=torch.channels_last)
        output, places = torch.ops.aten.max_pool2d_with_indices(images, *how, ceil_mode)
        return output.contiguous(), places.contiguous()

    def own() -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = torch.ops.aten.max_pool2d_with_indices(x, *how, ceil_mode)
        return found

    return fastest("max_pool2d", x, (*x.shape, *how[0]), {"torch": own, "last": last})


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value) * (2 // len(value))
