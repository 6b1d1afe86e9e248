"""Recurrent cells, forward and backward by hand: few kernels per time step, others for all steps.

    RNN     h_t = s(a_t + b_t),    s = tanh or relu
    GRU     r, z = sigmoid(a_t + b_t),  n = tanh(a_t + r b_t),  h_t = n + z (h_(t-1) - n)
    LSTM    i, f, o = sigmoid(a_t + b_t),  g = tanh(a_t + b_t),
            c_t = f c_(t-1) + i g,  h_t = o tanh(c_t)

a_t comes from the inputs, b_t = W h_(t-1) + bias. Backward, with dx for dL/dx:

    RNN     da = db = s' dh,                                  s' = 1 - h^2  or  [h > 0]
            dh_(t-1) = W^T db
    GRU     da = (R, Z, N) dh,   db = (R, Z, r N) dh          N = (1 - z) (1 - n^2)
            dh_(t-1) = z dh + W^T db                          Z = (h_(t-1) - n) z (1 - z)
                                                              R = b_n N r (1 - r)
    LSTM    dc = dc_t + K dh                                  K = o (1 - tanh^2 c_t)
            da = db = (I dc, F dc, G dc, O dh)                I = g i (1 - i),   G = i (1 - g^2)
            dc_(t-1) = f dc,   dh_(t-1) = W^T db              F = c_(t-1) f (1 - f)
                                                              O = tanh(c_t) o (1 - o)

Capitals do not depend on later time steps. They are computed for all t at once, in the memory of
the values they are computed from. The loop backward multiplies them by dh and dc and leaves da
there.

The loop computes the values of b_t. `state_linear` then tells the ledger which rows met W and bias:

    g_i = sum_t  d_it h_it^T  (of W),    sum_t d_it  (of bias),    d_it = dL/db_it

Sources: Hochreiter and Schmidhuber 1997; Cho et al. 2014, 1406.1078; torch.nn.RNN, GRU and LSTM,
documentation.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from anybatch._torch import (
    DisableTorchFunction,
    keeps_graph,
    linear_pointwise,
    num_dispatch_modes,
    reorder_linear_weight,
)
from anybatch.kernels.choice import find_way, has_alternative, run_fastest
from anybatch.ledger.contractions.base import Detach, RuleResult
from anybatch.ledger.contractions.linear import make_row_uses
from anybatch.ledger.gradient_taps import refuse_second_derivative

__all__ = [
    "GRU",
    "LSTM",
    "RELU",
    "TANH",
    "Cell",
    "States",
    "TimeAxis",
    "run_recurrence",
    "state_linear",
    "state_linear_rule",
]

States = Sequence[Tensor]  # h; of an LSTM h and c
Gradients = tuple[Tensor, Tensor, States]  # da, db, and the gradients of the initial states

_OFTEN = 16  # products with one matrix, from which packing it can be faster
_sigmoid_backward = torch.ops.aten.sigmoid_backward  # of d and y: d y (1 - y)
_tanh_backward = torch.ops.aten.tanh_backward  # of d and y: d (1 - y^2)


class TimeAxis(NamedTuple):
    """Dimension of time in a sequence, and its direction."""

    dim: int  # [T, B, ..] or [B, T, ..]
    is_reversed: bool

    def unbind(self, x: Tensor) -> Sequence[Tensor]:
        """Return the time steps of a sequence, the first to compute first."""
        steps = x.unbind(self.dim)
        return steps[::-1] if self.is_reversed else steps

    def previous_states(self, states: Tensor) -> Tensor:
        """Return the state before each time step, out of T + 1 states."""
        return states.narrow(self.dim, int(self.is_reversed), states.shape[self.dim] - 1)

    def next_states(self, states: Tensor) -> Tensor:
        """Return the state after each time step, out of T + 1 states."""
        return states.narrow(self.dim, int(not self.is_reversed), states.shape[self.dim] - 1)

    def allocate_states(self, a: Tensor, initial: Tensor) -> Tensor:
        """Allocate T + 1 states, contiguous in time, and fill in the initial one."""
        num_states = a.shape[self.dim] + 1
        states = initial.new_empty(num_states, *initial.shape).transpose(0, self.dim)
        self.unbind(states)[0].copy_(initial)
        return states


class Cell(NamedTuple):
    """Forward and backward of one kind of cell over a whole sequence."""

    forward: Callable[[TimeAxis, Tensor, States, Tensor, Tensor | None], States]
    """Compute from (time, a, initial states, W, bias) the tensors that `backward` needs, the T + 1
    states first. It may overwrite a."""
    backward: Callable[[TimeAxis, States, Tensor, Tensor, States], Gradients]
    """Compute gradients from (time, tensors of `forward`, W, dL/d outputs, dL/d final states). It
    may overwrite these tensors except for h, and the gradients of the final states."""


def run_recurrence(
    cell: Cell, time: TimeAxis, a: Tensor, initial: States, w: Tensor, bias: Tensor | None
) -> tuple[Tensor, States]:
    """Compute the outputs of all time steps, laid out as a, and the final states.

    Args:
        cell: the kind of cell.
        time: the axis of time in a.
        a: of the inputs, [T, B, k H] or [B, T, k H]; it is overwritten.
        initial: initial states, [B, H] each.
        w: [k H, H], the matrix of the states.
        bias: [k H].
    """
    wide = torch.promote_types(a.dtype, initial[0].dtype)  # autocast narrows products, not states
    initial = [state.to(wide) for state in initial]
    w_detached = w.detach().to(a.dtype)
    with _without_modes(a.device):
        bias_detached = None if bias is None else bias.detach().to(a.dtype)
        states = [x.detach() for x in initial]
        saved = cell.forward(time, a.detach(), states, w_detached, bias_detached)
    b = state_linear(time.previous_states(saved[0]).to(a.dtype), w, bias)
    outputs, *final = _Recurrence.apply(  # type: ignore[no-untyped-call]
        cell, time, a, b, w_detached, saved, *initial
    )
    return outputs, final


class _Recurrence(torch.autograd.Function):
    """Returns outputs and final states, which are computed, as functions of a, b and the initial
    states."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        time: TimeAxis,
        a: Tensor,
        b: Tensor,
        w: Tensor,
        saved: States,
        *initial: Tensor,
    ) -> Any:
        ctx.cell, ctx.time = cell, time
        ctx.save_for_backward(w, *saved)
        final = (time.unbind(states)[-1].clone() for states in saved[: len(initial)])
        return time.next_states(saved[0]).clone(memory_format=torch.contiguous_format), *final

    @staticmethod
    def backward(ctx: Any, d_outputs: Tensor, *d_final: Tensor) -> Any:
        refuse_second_derivative()
        w, h, *others = ctx.saved_tensors
        if keeps_graph():  # another pass may follow
            others = [x.clone() for x in others]
        with _without_modes(w.device):
            d_states = [d.clone() for d in d_final]
            d_a, d_b, d_initial = ctx.cell.backward(ctx.time, [h, *others], w, d_outputs, d_states)
        return None, None, d_a, d_b, None, None, *d_initial


def state_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear` of rows [.., d] without a graph. If a mode intercepts it, the result has
    no values: `_Recurrence` does not read them."""
    if has_torch_function_variadic(rows, weight):
        output: Tensor = handle_torch_function(state_linear, (rows, weight), rows, weight, bias)
        return output
    return F.linear(rows, weight, bias)


def state_linear_rule(
    detach: Detach, rows: Tensor, weight: Tensor, bias: Tensor | None = None
) -> RuleResult | None:
    """Apply the rule of `state_linear`; None: the matrix is data with a gradient of its own."""
    constants = detach(weight), None if bias is None else detach(bias)
    for p, constant in zip((weight, bias), constants, strict=True):
        if constant is not None and constant is p and constant.requires_grad:
            return None
    if constants[0].requires_grad:  # a checked pass: plain autograd needs the values
        output = F.linear(rows, *constants)
    else:
        output = rows.new_empty(()).expand(*rows.shape[:-1], len(weight)).detach()
    return make_row_uses(output, rows, weight, bias, is_transposed=False)


def _make_rnn(activation: Callable[..., Tensor], slope: Callable[..., Tensor]) -> Cell:
    def forward(
        time: TimeAxis, a: Tensor, initial: States, w: Tensor, bias: Tensor | None
    ) -> States:
        h = time.allocate_states(a, initial[0].to(a.dtype))
        previous, *following = time.unbind(h)
        multiply = _make_product(w, bias, previous, len(following))
        for a_t, h_t in zip(time.unbind(a), following, strict=True):
            previous = activation(a_t.add_(multiply(previous)), out=h_t)
        return (h,)

    def backward(
        time: TimeAxis, saved: States, w: Tensor, d_outputs: Tensor, d_final: States
    ) -> Gradients:
        h, (d_h,) = time.next_states(saved[0]), d_final
        d = torch.empty_like(h)
        steps = _reverse_steps(time, d, h, d_outputs)
        multiply = _make_product(w.T, None, steps[0][0], len(steps))
        for d_t, h_t, d_output in steps:
            d_h = multiply(slope(d_h.add_(d_output), h_t, grad_input=d_t))
        return d, d, (d_h,)

    return Cell(forward, backward)


def _run_gru(time: TimeAxis, a: Tensor, initial: States, w: Tensor, bias: Tensor | None) -> States:
    h = time.allocate_states(a, initial[0])
    previous, *following = time.unbind(h)
    width = h.shape[-1]
    multiply = _make_product(w, bias, previous, len(following))
    b_n = a.new_empty([*a.shape[:2], width])
    rz, n = (time.unbind(part) for part in a.split_with_sizes([2 * width, width], -1))
    for rz_t, n_t, b_n_t, h_t in zip(rz, n, time.unbind(b_n), following, strict=True):
        rz_b, n_b = multiply(previous).split_with_sizes([2 * width, width], 1)
        r_t, z_t = rz_t.add_(rz_b).sigmoid_().chunk(2, 1)
        n_t.add_(r_t * b_n_t.copy_(n_b)).tanh_()
        previous = torch.sub(previous, n_t, out=h_t).mul_(z_t).add_(n_t)
    return h, a, b_n


def _run_gru_backward(
    time: TimeAxis, saved: States, w: Tensor, d_outputs: Tensor, d_final: States
) -> Gradients:
    (h, d_a, b_n), (d_h,) = saved, d_final
    r, z, n = d_a.chunk(3, -1)
    d_b, z_values = torch.empty_like(d_a), z.clone()
    _sigmoid_backward(time.previous_states(h) - n, z, grad_input=z)
    _tanh_backward(1 - z_values, n, grad_input=n)
    torch.mul(r, n, out=d_b.chunk(3, -1)[2])
    _sigmoid_backward(b_n.mul_(n), r, grad_input=r)
    d_b.chunk(3, -1)[0].copy_(r)
    d_b.chunk(3, -1)[1].copy_(z)
    a_parts, b_parts = (d.view(*d.shape[:2], 3, -1) for d in (d_a, d_b))
    steps = _reverse_steps(time, d_b, a_parts, b_parts, z_values, d_outputs)
    multiply = _make_product(w.T, None, steps[0][0], len(steps))
    for d_b_t, a_parts_t, b_parts_t, z_t, d_output in steps:
        d_h.add_(d_output)
        a_parts_t.mul_(d_h[:, None])
        b_parts_t.mul_(d_h[:, None])
        d_h.mul_(z_t).add_(multiply(d_b_t))
    return d_a, d_b, (d_h,)


def _run_lstm(time: TimeAxis, a: Tensor, initial: States, w: Tensor, bias: Tensor | None) -> States:
    h, c = (time.allocate_states(a, state) for state in initial)
    (h_previous, *h_following), (c_previous, *c_following) = time.unbind(h), time.unbind(c)
    tanh_c = torch.empty_like(time.next_states(c))
    multiply = _make_product(w, bias, h_previous, len(h_following))
    parts = a, a[..., : 2 * h.shape[-1]], *a.chunk(4, -1), tanh_c
    steps = zip(*(time.unbind(part) for part in parts), h_following, c_following, strict=True)
    for a_t, if_t, i, f, g, o, tanh_c_t, h_t, c_t in steps:
        a_t.add_(multiply(h_previous))
        if_t.sigmoid_()
        torch.mul(f, c_previous, out=c_t).add_(i * g.tanh_())
        torch.mul(o.sigmoid_(), torch.tanh(c_t, out=tanh_c_t), out=h_t)
        h_previous, c_previous = h_t, c_t
    return h, c, a, tanh_c


def _run_lstm_backward(
    time: TimeAxis, saved: States, w: Tensor, d_outputs: Tensor, d_final: States
) -> Gradients:
    (_, c, d, tanh_c), (d_h, d_c) = saved, d_final
    i, f, g, o = d.chunk(4, -1)
    k = _tanh_backward(o, tanh_c)
    _sigmoid_backward(tanh_c, o, grad_input=o)
    slope = _sigmoid_backward(time.previous_states(c), f, grad_input=tanh_c)
    f_values = time.previous_states(c).copy_(f)
    f.copy_(slope)
    _tanh_backward(i, g, grad_input=slope)
    _sigmoid_backward(g, i, grad_input=i)
    g.copy_(slope)
    ifg = d.view(*d.shape[:2], 4, -1)[:, :, :3]
    steps = _reverse_steps(time, d, ifg, o, k, f_values, d_outputs)
    multiply = _make_product(w.T, None, steps[0][0], len(steps))
    for d_t, ifg_t, o_t, k_t, f_t, d_output in steps:
        o_t.mul_(d_h.add_(d_output))
        ifg_t.mul_(d_c.addcmul_(d_h, k_t)[:, None])
        d_c.mul_(f_t)
        d_h = multiply(d_t).to(d_c.dtype)
    return d, d, (d_h, d_c)


def _make_product(
    w: Tensor, bias: Tensor | None, x: Tensor, times: int
) -> Callable[[Tensor], Tensor]:
    """Return a function that computes x W^T + bias for many x like this one.

    oneDNN's kernel needs a packed W, which is packed once.
    """

    def multiply_by_torch(x: Tensor) -> Tensor:
        return F.linear(x.to(w.dtype), w, bias)

    name, sizes = "product again", (*x.shape, len(w))
    has_dispatch_mode = num_dispatch_modes() > 0  # packed tensors are unknown to it
    if times < _OFTEN or has_dispatch_mode or not has_alternative(x, w):
        return multiply_by_torch
    if find_way(name, x, sizes) == "torch":
        return multiply_by_torch
    packed_w = reorder_linear_weight(w.contiguous(), len(x))

    def multiply_by_onednn(x: Tensor) -> Tensor:
        y: Tensor = linear_pointwise(x, packed_w, bias, "none", [], "")
        return y

    if find_way(name, x, sizes) is None:
        ways = {"torch": lambda: multiply_by_torch(x), "onednn": lambda: multiply_by_onednn(x)}
        run_fastest(name, x, sizes, ways)
    return multiply_by_onednn if find_way(name, x, sizes) == "onednn" else multiply_by_torch


@contextmanager
def _without_modes(device: torch.device) -> Iterator[None]:
    """Disable modes, autograd and autocast."""
    with torch.no_grad(), DisableTorchFunction(), torch.autocast(device.type, enabled=False):
        yield


def _reverse_steps(time: TimeAxis, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """List the time steps of several tensors, the last first."""
    return list(zip(*(time.unbind(x)[::-1] for x in tensors), strict=True))


TANH = _make_rnn(torch.tanh, _tanh_backward)
RELU = _make_rnn(
    partial(torch.clamp, min=0), partial(torch.ops.aten.threshold_backward, threshold=0)
)
GRU = Cell(_run_gru, _run_gru_backward)
LSTM = Cell(_run_lstm, _run_lstm_backward)
