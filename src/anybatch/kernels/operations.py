"""Operations of torch by faster kernels, with the same values and gradients up to rounding.

    y = x W^T + b,      dL/dx = d W,    dL/dW = d^T x,    dL/db = sum of d over rows,    d = dL/dy

Max pooling has the same bits: on a CPU torch is faster with channels last in memory.

The kernel of an operation depends on its sizes and on measurements, never on earlier results, so a
resumed run computes as an uninterrupted one.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anybatch._torch import DisableTorchFunction, unsafe_view
from anybatch.kernels.choice import (
    SMALL,
    find_way,
    get_way,
    has_alternative,
    is_plain,
    multiply,
    name_product,
    run_fastest,
)
from anybatch.model_facts import find_record

__all__ = ["FASTER", "Faster", "choose_kernels", "linear", "max_pool2d"]

_WORTH = 2**27
"""Multiplications below which an autograd node in Python costs what a linear layer gains."""


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Compute `torch.nn.functional.linear`; None: torch's kernels are the best."""
    if input.ndim < 2 or not has_alternative(input, weight) or torch.is_autocast_enabled("cpu"):
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
    if all(_measure_product(input, *product) == "torch" for product in products):
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
    """Compute `torch.nn.functional.max_pool2d`; None: torch's kernel is the best."""
    if return_indices or input.ndim != 4 or input.numel() < SMALL or not is_plain(input):
        return None
    if not input.is_contiguous():  # its channels are last already
        return None
    settings = _pair(kernel_size), _pair(stride or kernel_size), _pair(padding), _pair(dilation)
    sizes = (*input.shape, *settings[0])
    if find_way("max_pool2d", input, sizes) is None:
        _pool(input.detach(), settings, ceil_mode)
    if find_way("max_pool2d", input, sizes) == "torch":
        return None
    output: Tensor = _MaxPool2d.apply(input, settings, ceil_mode)  # type: ignore[no-untyped-call]
    return output


FASTER: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.linear: linear,
    F.max_pool2d: max_pool2d,
}
"""Replacement of each operation."""


class Faster(TorchFunctionMode):
    """Mode in which operations use the fastest kernels.

    `is_useful` says afterwards whether any kernel was another than torch's. A mode costs some
    microseconds per operation, so a model without use for it runs without.

    Args:
        useless: set to which the mode adds the kind of a pass that had no use for it.
        kind: of the pass.
    """

    def __init__(self, useless: set[Hashable] | None = None, kind: Hashable = None) -> None:
        super().__init__()
        self.is_useful = False
        self._useless, self._kind = useless, kind

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        faster = FASTER.get(func)
        output = None if faster is None else faster(*args, **kwargs)
        if output is None:
            return func(*args, **kwargs)
        self.is_useful = True
        return output

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self._useless is not None and error[0] is None and not self.is_useful:
            self._useless.add(self._kind)


class _Useless(set[Hashable]):
    """Kinds of passes of a model in which no operation had a faster kernel."""


def choose_kernels(model: nn.Module, *kind: Hashable) -> AbstractContextManager[object]:
    """Return the context for a forward pass of some kind: mode and number of examples.

    It does nothing once a pass of that kind had no use for it. Results have the same bits.
    """
    if get_way() == "torch" or type(model).__name__ == "OptimizedModule":
        return nullcontext()
    useless = find_record(model, _Useless)
    return nullcontext() if kind in useless else Faster(useless, kind)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w)
        y = multiply(_flatten_rows(x), w, bias)
        output: Tensor = unsafe_view(y, [*x.shape[:-1], len(w)])
        return output

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        needs_x, needs_w, needs_bias = ctx.needs_input_grad
        with DisableTorchFunction():  # modes need not see these products
            (x, w), rows = ctx.saved_tensors, _flatten_rows(d)
            # create_graph=True needs a derivative, which only torch's kernel has.
            function = F.linear if torch.is_grad_enabled() else multiply
            return (
                function(rows, w.T).view(*d.shape[:-1], -1) if needs_x else None,
                function(rows.T, _flatten_rows(x).T) if needs_w else None,
                rows.sum(0) if needs_bias else None,
            )


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: Sequence[Any], ceil_mode: bool) -> Tensor:
        output, indices = _pool(x, settings, ceil_mode)
        ctx.settings = (*settings, ceil_mode)
        ctx.save_for_backward(x, indices)
        return output

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        x, indices = ctx.saved_tensors
        function = torch.ops.aten.max_pool2d_with_indices_backward
        return function(d.contiguous(), x, *ctx.settings, indices), None, None


def _measure_product(
    like: Tensor, strides: str, bias: Tensor | None, sizes: tuple[int, int, int]
) -> str:
    """Return the way of a product, and measure it first if needed."""
    name, (n, d, p) = name_product(strides, bias), sizes
    if find_way(name, like, sizes) is None:
        x, w = like.new_ones(n, d), like.new_ones(p, d)
        if "t" in strides:
            w = like.new_ones(d, p).T
        if strides == "tt":
            x = like.new_ones(d, n).T
        multiply(x, w, None if bias is None else bias.detach())
    return find_way(name, like, sizes) or "torch"


def _pool(x: Tensor, settings: Sequence[Any], ceil_mode: bool) -> tuple[Tensor, Tensor]:
    """Compute the maxima and their indices."""
    function = torch.ops.aten.max_pool2d_with_indices

    def pool() -> tuple[Tensor, Tensor]:
        output, indices = function(x, *settings, ceil_mode)
        return output, indices

    def pool_channels_last() -> tuple[Tensor, Tensor]:
        images = x.contiguous(memory_format=torch.channels_last)
        output, indices = function(images, *settings, ceil_mode)
        return output.contiguous(), indices.contiguous()

    ways = {"torch": pool, "last": pool_channels_last}
    return run_fastest("max_pool2d", x, (*x.shape, *settings[0]), ways)


def _flatten_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value) * (2 // len(value))
