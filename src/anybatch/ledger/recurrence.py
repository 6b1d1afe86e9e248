"""Recurrences by hand, forward and back: few kernels a moment, and the rest for all at once.

    RNN     h_t = s(a_t + b_t),    s = tanh or relu
    GRU     r, z = sigmoid(a_t + b_t),  n = tanh(a_t + r b_t),  h_t = n + z (h_(t-1) - n)
    LSTM    i, f, o = sigmoid(a_t + b_t),  g = tanh(a_t + b_t),
            c_t = f c_(t-1) + i g,  h_t = o tanh(c_t)

a_t comes from the inputs, b_t = W h_(t-1) + bias. Backwards, with dx for dL/dx:

    RNN     da = db = s' dh,                                  s' = 1 - h^2  or  [h > 0]
            dh_(t-1) = W^T db
    GRU     da = (R, Z, N) dh,   db = (R, Z, r N) dh          N = (1 - z) (1 - n^2)
            dh_(t-1) = z dh + W^T db                          Z = (h_(t-1) - n) z (1 - z)
                                                              R = b_n N r (1 - r)
    LSTM    dc = dc_t + K dh                                  K = o (1 - tanh^2 c_t)
            da = db = (I dc, F dc, G dc, O dh)                I = g i (1 - i),   G = i (1 - g^2)
            dc_(t-1) = f dc,   dh_(t-1) = W^T db              F = c_(t-1) f (1 - f)
                                                              O = tanh(c_t) o (1 - o)

Capitals do not depend on what follows: they are made for all t in one go, in the place of what they
are made of, and the loop back, which multiplies them by dh and dc, leaves da there.

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

from anybatch._torch import (
    DisableTorchFunction,
    keeps_graph,
    linear_pointwise,
    num_dispatch_modes,
    reorder_linear_weight,
)
from anybatch.kernels.choice import chosen, fastest, pays
from anybatch.ledger.contractions.known import known_linear
from anybatch.ledger.taps import refuse_second_derivative

__all__ = ["GRU", "LSTM", "RELU", "TANH", "Order", "Recurrence", "States", "recur"]

States = Sequence[Tensor]  # h; of an LSTM h and c
Back = tuple[Tensor, Tensor, States]  # da, db, and the gradients of the states that it began with

_OFTEN = 16  # products by one matrix, from which packing it may pay
_sigmoid_back = torch.ops.aten.sigmoid_backward  # of d and y: d y (1 - y)
_tanh_back = torch.ops.aten.tanh_backward  # of d and y: d (1 - y^2)


class Order(NamedTuple):
    """How time lies in tensors."""

    dim: int  # [T, B, ..] or [B, T, ..]
    is_reversed: bool

    def moments(self, x: Tensor) -> Sequence[Tensor]:
        """One after the other."""
        found = x.unbind(self.dim)
        return found[::-1] if self.is_reversed else found

    def before(self, states: Tensor) -> Tensor:
        """Of T + 1 states, the one that each moment begins with."""
        return states.narrow(self.dim, int(self.is_reversed), states.shape[self.dim] - 1)

    def after(self, states: Tensor) -> Tensor:
        """Of T + 1 states, the one that each moment leaves."""
        return states.narrow(self.dim, int(not self.is_reversed), states.shape[self.dim] - 1)

    def room(self, a: Tensor, begun: Tensor) -> Tensor:
        """For T + 1 states, one behind the other in memory, the first of them filled in."""
        num_states = a.shape[self.dim] + 1
        states = begun.new_empty(num_states, *begun.shape).transpose(0, self.dim)
        self.moments(states)[0].copy_(begun)
        return states


class Recurrence(NamedTuple):
    """One kind."""

    forward: Callable[[Order, Tensor, States, Tensor, Tensor | None], States]
    """(order, a, states to begin with, W, bias): what the way back needs, T + 1 states first. It
    may overwrite a."""
    back: Callable[[Order, States, Tensor, Tensor, States], Back]
    """(order, what was kept, W, dL/d outputs, dL/d ends). It may overwrite all that was kept but
    h, and the gradients of the ends."""


def recur(
    kind: Recurrence, order: Order, a: Tensor, begun: States, w: Tensor, bias: Tensor | None
) -> tuple[Tensor, States]:
    """Outputs of all moments, laid out as a, and the states at the end.

    Args:
        kind: of the cell.
        order: of time in a.
        a: of the inputs, [T, B, k H] or [B, T, k H], which is used up.
        begun: states to begin with, [B, H] each.
        w: of the states, [k H, H].
        bias: [k H].
    """
    wide = torch.promote_types(a.dtype, begun[0].dtype)  # autocast narrows products, not states
    begun = [state.to(wide) for state in begun]
    w_alone = w.detach().to(a.dtype)
    with _unseen(a.device):
        bias_alone = None if bias is None else bias.detach().to(a.dtype)
        kept = kind.forward(order, a.detach(), [x.detach() for x in begun], w_alone, bias_alone)
    b = known_linear(order.before(kept[0]).to(a.dtype), w, bias)
    outputs, *ends = _Recur.apply(  # type: ignore[no-untyped-call]
        kind, order, a, b, w_alone, kept, *begun
    )
    return outputs, ends


class _Recur(torch.autograd.Function):
    """Outputs and ends, which are known, as functions of a, b and the states to begin with."""

    @staticmethod
    def forward(
        ctx: Any,
        kind: Recurrence,
        order: Order,
        a: Tensor,
        b: Tensor,
        w: Tensor,
        kept: States,
        *begun: Tensor,
    ) -> Any:
        ctx.kind, ctx.order = kind, order
        ctx.save_for_backward(w, *kept)
        ends = (order.moments(states)[-1].clone() for states in kept[: len(begun)])
        return order.after(kept[0]).clone(memory_format=torch.contiguous_format), *ends

    @staticmethod
    def backward(ctx: Any, d_outputs: Tensor, *d_ends: Tensor) -> Any:
        refuse_second_derivative()
        w, h, *others = ctx.saved_tensors
        if keeps_graph():  # it must not be overwritten
            others = [x.clone() for x in others]
        with _unseen(w.device):
            ends = [d.clone() for d in d_ends]
            d_a, d_b, d_begun = ctx.kind.back(ctx.order, [h, *others], w, d_outputs, ends)
        return None, None, d_a, d_b, None, None, *d_begun


def _rnn(activation: Callable[..., Tensor], slope: Callable[..., Tensor]) -> Recurrence:
    def forward(order: Order, a: Tensor, begun: States, w: Tensor, bias: Tensor | None) -> States:
        h = order.room(a, begun[0].to(a.dtype))
        before, *after = order.moments(h)
        b = _products(w, bias, before, len(after))
        for a_t, h_t in zip(order.moments(a), after, strict=True):
            before = activation(a_t.add_(b(before)), out=h_t)
        return (h,)

    def back(order: Order, kept: States, w: Tensor, d_outputs: Tensor, d_ends: States) -> Back:
        h, (d_h,) = order.after(kept[0]), d_ends
        d = torch.empty_like(h)
        moments = _backwards(order, d, h, d_outputs)
        onwards = _products(w.T, None, moments[0][0], len(moments))
        for d_t, h_t, d_output in moments:
            d_h = onwards(slope(d_h.add_(d_output), h_t, grad_input=d_t))
        return d, d, (d_h,)

    return Recurrence(forward, back)


def _gru_forward(order: Order, a: Tensor, begun: States, w: Tensor, bias: Tensor | None) -> States:
    h = order.room(a, begun[0])
    before, *after = order.moments(h)
    width = h.shape[-1]
    b, b_n = _products(w, bias, before, len(after)), a.new_empty([*a.shape[:2], width])
    rz, n = (order.moments(part) for part in a.split_with_sizes([2 * width, width], -1))
    for rz_t, n_t, b_n_t, h_t in zip(rz, n, order.moments(b_n), after, strict=True):
        rz_b, n_b = b(before).split_with_sizes([2 * width, width], 1)
        r_t, z_t = rz_t.add_(rz_b).sigmoid_().chunk(2, 1)
        n_t.add_(r_t * b_n_t.copy_(n_b)).tanh_()
        before = torch.sub(before, n_t, out=h_t).mul_(z_t).add_(n_t)
    return h, a, b_n


def _gru_back(order: Order, kept: States, w: Tensor, d_outputs: Tensor, d_ends: States) -> Back:
    (h, d_a, b_n), (d_h,) = kept, d_ends
    r, z, n = d_a.chunk(3, -1)
    d_b, keep = torch.empty_like(d_a), z.clone()
    _sigmoid_back(order.before(h) - n, z, grad_input=z)
    _tanh_back(1 - keep, n, grad_input=n)
    torch.mul(r, n, out=d_b.chunk(3, -1)[2])
    _sigmoid_back(b_n.mul_(n), r, grad_input=r)
    d_b.chunk(3, -1)[0].copy_(r)
    d_b.chunk(3, -1)[1].copy_(z)
    a_parts, b_parts = (d.view(*d.shape[:2], 3, -1) for d in (d_a, d_b))
    moments = _backwards(order, d_b, a_parts, b_parts, keep, d_outputs)
    onwards = _products(w.T, None, moments[0][0], len(moments))
    for d_b_t, a_parts_t, b_parts_t, z_t, d_output in moments:
        d_h.add_(d_output)
        a_parts_t.mul_(d_h[:, None])
        b_parts_t.mul_(d_h[:, None])
        d_h.mul_(z_t).add_(onwards(d_b_t))
    return d_a, d_b, (d_h,)


def _lstm_forward(order: Order, a: Tensor, begun: States, w: Tensor, bias: Tensor | None) -> States:
    h, c = (order.room(a, state) for state in begun)
    (h_before, *h_after), (c_before, *c_after) = order.moments(h), order.moments(c)
    tanh_c = torch.empty_like(order.after(c))
    b = _products(w, bias, h_before, len(h_after))
    parts = a, a[..., : 2 * h.shape[-1]], *a.chunk(4, -1), tanh_c
    moments = zip(*(order.moments(part) for part in parts), h_after, c_after, strict=True)
    for a_t, if_t, i, f, g, o, tanh_c_t, h_t, c_t in moments:
        a_t.add_(b(h_before))
        if_t.sigmoid_()
        torch.mul(f, c_before, out=c_t).add_(i * g.tanh_())
        torch.mul(o.sigmoid_(), torch.tanh(c_t, out=tanh_c_t), out=h_t)
        h_before, c_before = h_t, c_t
    return h, c, a, tanh_c


def _lstm_back(order: Order, kept: States, w: Tensor, d_outputs: Tensor, d_ends: States) -> Back:
    (_, c, d, tanh_c), (d_h, d_c) = kept, d_ends
    i, f, g, o = d.chunk(4, -1)
    k = _tanh_back(o, tanh_c)
    _sigmoid_back(tanh_c, o, grad_input=o)
    slope = _sigmoid_back(order.before(c), f, grad_input=tanh_c)
    keep = order.before(c).copy_(f)
    f.copy_(slope)
    _tanh_back(i, g, grad_input=slope)
    _sigmoid_back(g, i, grad_input=i)
    g.copy_(slope)
    into_c = d.view(*d.shape[:2], 4, -1)[:, :, :3]
    moments = _backwards(order, d, into_c, o, k, keep, d_outputs)
    onwards = _products(w.T, None, moments[0][0], len(moments))
    for d_t, into_c_t, o_t, k_t, keep_t, d_output in moments:
        o_t.mul_(d_h.add_(d_output))
        into_c_t.mul_(d_c.addcmul_(d_h, k_t)[:, None])
        d_c.mul_(keep_t)
        d_h = onwards(d_t).to(d_c.dtype)
    return d, d, (d_h, d_c)


def _products(w: Tensor, bias: Tensor | None, x: Tensor, times: int) -> Callable[[Tensor], Tensor]:
    """x W^T + bias for so many x like this one; for oneDNN's kernel W is packed beforehand."""

    def torchs(x: Tensor) -> Tensor:
        return F.linear(x.to(w.dtype), w, bias)

    what, sizes = "product again", (*x.shape, len(w))
    is_watched = num_dispatch_modes() > 0  # by what knows no packed tensors
    if times < _OFTEN or is_watched or not pays(x, w) or chosen(what, x, sizes) == "torch":
        return torchs
    packed = reorder_linear_weight(w.contiguous(), len(x))

    def onednns(x: Tensor) -> Tensor:
        found: Tensor = linear_pointwise(x, packed, bias, "none", [], "")
        return found

    if chosen(what, x, sizes) is None:
        fastest(what, x, sizes, {"torch": lambda: torchs(x), "onednn": lambda: onednns(x)})
    return onednns if chosen(what, x, sizes) == "onednn" else torchs


@contextmanager
def _unseen(device: torch.device) -> Iterator[None]:
    """By modes, autograd and autocast."""
    with (
        torch.no_grad(),
        DisableTorchFunction(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


def _backwards(order: Order, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Their moments, the last first."""
    return list(zip(*(order.moments(x)[::-1] for x in tensors), strict=True))


TANH = _rnn(torch.tanh, _tanh_back)
RELU = _rnn(partial(torch.clamp, min=0), partial(torch.ops.aten.threshold_backward, threshold=0))
GRU = Recurrence(_gru_forward, _gru_back)
LSTM = Recurrence(_lstm_forward, _lstm_back)
