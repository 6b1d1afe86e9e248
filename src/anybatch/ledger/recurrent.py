"""Recurrent layers, written out: what torch computes in one call, as products that can be watched.

    RNN     h_t = s(W_i x_t + b_i + W_h h_(t-1) + b_h),    s = tanh or relu
    GRU     r, z = sigmoid(...),  n = tanh(a_n + r * b_n),  h_t = n + z * (h_(t-1) - n)
    LSTM    i, f, o = sigmoid(...),  g = tanh(...),  c_t = f * c_(t-1) + i * g,  h_t = o * tanh(c_t)
            and h_t = W_p (o * tanh(c_t)) where it is projected

a = W_i x_t + b_i for all t at once, b = W_h h_(t-1) + b_h step by step. Dropout between layers
draws as torch's does.

Source: torch.nn.RNN, GRU and LSTM, documentation.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch.errors import LedgerError

__all__ = ["RECURRENT"]

States = tuple[Tensor, ...]  # of one layer and direction, the output first
Cell = Callable[[Tensor, Tensor, States], States]


def _rnn(activation: Callable[[Tensor], Tensor]) -> Cell:
    def step(a: Tensor, b: Tensor, states: States) -> States:
        return (activation(a + b),)

    return step


def _gru(a: Tensor, b: Tensor, states: States) -> States:
    (r_a, z_a, n_a), (r_b, z_b, n_b) = a.chunk(3, -1), b.chunk(3, -1)
    n = torch.tanh(n_a + torch.sigmoid(r_a + r_b) * n_b)
    return (n + torch.sigmoid(z_a + z_b) * (states[0] - n),)


def _lstm(a: Tensor, b: Tensor, states: States) -> States:
    i, f, g, o = (a + b).chunk(4, -1)
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _layers(cell: Cell, num_states: int) -> Callable[..., Any]:
    """A call of torch's with that cell."""

    def run(
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        if not isinstance(has_biases, bool):
            raise LedgerError(
                "a recurrent layer was given a packed sequence, whose examples lie scattered over "
                "its rows, expected a padded one. Pad it, and take the states at the ends."
            )
        starts = [hx] if isinstance(hx, Tensor) else list(hx)
        sequence = input.transpose(0, 1) if batch_first else input
        sides = 2 if bidirectional else 1
        each = len(params) // (num_layers * sides)
        ends: list[States] = []
        for layer in range(num_layers):
            outputs = []
            for side in range(sides):
                number = layer * sides + side
                own = params[number * each : (number + 1) * each]
                begun = tuple(start[number] for start in starts)
                found, end = _direction(cell, sequence, own, begun, is_reversed=bool(side))
                outputs.append(found)
                ends.append(end)
            sequence = torch.cat(outputs, -1) if sides == 2 else outputs[0]
            if dropout and train and layer + 1 < num_layers:
                sequence = torch.dropout(sequence, dropout, True)
        states = [torch.stack([end[k] for end in ends]) for k in range(num_states)]
        return (sequence.transpose(0, 1) if batch_first else sequence, *states)

    return run


class _Moment(NamedTuple):
    """One step in time, with a graph of its own from a, b and the states before to those after."""

    a: Tensor
    b: Tensor
    before: States
    after: States


def _direction(
    cell: Cell, sequence: Tensor, params: Sequence[Tensor], begun: States, *, is_reversed: bool
) -> tuple[Tensor, States]:
    w_i, w_h, *others = params
    b_i, b_h = others[:2] if len(others) > 1 else (None, None)
    a = F.linear(sequence, w_i, b_i)
    if len(others) % 2:
        return _projected(cell, a, w_h, b_h, others[-1], begun, is_reversed=is_reversed)
    same = torch.autograd.graph.saved_tensors_hooks(_itself, _itself)  # not checkpointing's
    with torch._C.DisableTorchFunction(), same:  # W_h is met below, at all times at once
        moments = _moments(cell, a, w_h, b_h, begun, is_reversed=is_reversed)
        before = torch.stack([moment.before[0].detach() for moment in moments])
    b = F.linear(before, w_h, b_h)
    outputs, *ends = _Recurrence.apply(  # type: ignore[no-untyped-call]
        moments, is_reversed, a, b, *begun
    )
    return outputs, tuple(ends)


def _moments(
    cell: Cell, a: Tensor, w_h: Tensor, b_h: Tensor | None, begun: States, *, is_reversed: bool
) -> list[_Moment]:
    """In order of the sequence."""
    constants = w_h.detach(), None if b_h is None else b_h.detach()
    moments, states = [], begun
    for a_t in reversed(a.detach().unbind()) if is_reversed else a.detach().unbind():
        before = tuple(state.detach().requires_grad_() for state in states)
        own, b_t = a_t.requires_grad_(), F.linear(before[0], *constants)
        states = cell(own, b_t, before)
        moments.append(_Moment(own, b_t, before, states))
    return moments[::-1] if is_reversed else moments


class _Recurrence(torch.autograd.Function):
    """The outputs and last states as functions of a and b, once they are known."""

    @staticmethod
    def forward(
        ctx: Any, moments: list[_Moment], is_reversed: bool, a: Tensor, b: Tensor, *begun: Tensor
    ) -> Any:
        ctx.moments, ctx.is_reversed = moments, is_reversed
        outputs = torch.stack([moment.after[0].detach() for moment in moments])
        return outputs, *(end.detach().clone() for end in moments[0 if is_reversed else -1].after)

    @staticmethod
    def backward(ctx: Any, d_outputs: Tensor, *d_ends: Tensor) -> Any:
        d_a, d_b, d = [], [], list(d_ends)
        with torch._C.DisableTorchFunction():
            back = list(zip(ctx.moments, d_outputs.unbind(), strict=True))
            for moment, d_t in back if ctx.is_reversed else reversed(back):
                d[0] = d[0] + d_t
                d_own, d_met, *d = torch.autograd.grad(
                    moment.after, (moment.a, moment.b, *moment.before), d, retain_graph=True
                )
                d_a.append(d_own)
                d_b.append(d_met)
            if not ctx.is_reversed:
                d_a.reverse()
                d_b.reverse()
            return None, None, torch.stack(d_a), torch.stack(d_b), *d


def _itself(x: Tensor) -> Tensor:
    return x


def _projected(
    cell: Cell,
    a: Tensor,
    w_h: Tensor,
    b_h: Tensor | None,
    w_p: Tensor,
    begun: States,
    *,
    is_reversed: bool,
) -> tuple[Tensor, States]:
    states, outputs = begun, []
    for t in reversed(range(len(a))) if is_reversed else range(len(a)):
        states = cell(a[t], F.linear(states[0], w_h, b_h), states)
        states = (F.linear(states[0], w_p), *states[1:])
        outputs.append(states[0])
    return torch.stack(outputs[::-1] if is_reversed else outputs), states


def _one_step(cell: Cell) -> Callable[..., Any]:
    """A call of one of torch's cells."""

    def run(
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        w_i: Tensor,
        w_h: Tensor,
        b_i: Tensor | None = None,
        b_h: Tensor | None = None,
    ) -> Any:
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        ends = cell(F.linear(input, w_i, b_i), F.linear(states[0], w_h, b_h), states)
        return ends[0] if isinstance(hx, Tensor) else ends

    return run


RECURRENT: dict[Any, Callable[..., Any]] = {
    torch.rnn_tanh: _layers(_rnn(torch.tanh), 1),
    torch.rnn_relu: _layers(_rnn(torch.relu), 1),
    torch.gru: _layers(_gru, 1),
    torch.lstm: _layers(_lstm, 2),
    torch.rnn_tanh_cell: _one_step(_rnn(torch.tanh)),
    torch.rnn_relu_cell: _one_step(_rnn(torch.relu)),
    torch.gru_cell: _one_step(_gru),
    torch.lstm_cell: _one_step(_lstm),
}
"""What a call of torch is replaced by."""
