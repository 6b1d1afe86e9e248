"""Recurrent layers, written out: what torch computes in one call, as products that can be watched.

a = W_i x_t + b_i for all t at once is a linear layer, what follows is a `recurrence`. With a
projection an LSTM goes step by step,

    i, f, o = sigmoid(a + b),  g = tanh(a + b),    b = W_h h_(t-1) + b_h
    c_t = f c_(t-1) + i g,  h_t = W_p (o tanh(c_t))

Dropout between layers draws as torch's does. Packed sequences go by stretches (`packed`).

Source: torch.nn.RNN, GRU and LSTM, documentation.

Recurrent layers over packed sequences: rows by time step, the longest sequence first.

    t_0 .. t_1 - 1    time steps at which the same b sequences are still running

Such a stretch of rows is a padded batch [t_1 - t_0, b, d] as it stands. Forwards in time b falls,
and the states of those that end are final; backwards b grows, and those that join bring their
initial states.

Source: torch.nn.utils.rnn.PackedSequence, documentation.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch.ledger.contractions.recurrent_cells import (
    GRU,
    LSTM,
    RELU,
    TANH,
    Order,
    Recurrence,
    States,
    recur,
)

__all__ = ["RECURRENT", "TWICE_DIFFERENTIABLE", "Direction", "packed"]


Direction = Callable[[Order, Tensor, Sequence[Tensor], States], tuple[Tensor, States]]
"""One layer in one direction: outputs and final states of a sequence [T, B, d]."""


def packed(direction: Direction, batch_sizes: Tensor) -> Direction:
    """The same layer for rows [N, d] of so many running sequences at each time step."""
    sizes, lengths = (x.tolist() for x in torch.unique_consecutive(batch_sizes, return_counts=True))
    shapes = list(zip(lengths, sizes, strict=True))
    counts = [t * b for t, b in shapes]

    def run(
        order: Order, rows: Tensor, params: Sequence[Tensor], begun: States
    ) -> tuple[Tensor, States]:
        stretches = [
            part.view(*shape, *part.shape[1:])
            for part, shape in zip(torch.split(rows, counts), shapes, strict=True)
        ]
        outputs = []
        ended: list[States] = []
        states: States = [state[:0] if order.is_reversed else state for state in begun]
        for stretch in stretches[::-1] if order.is_reversed else stretches:
            running, before = stretch.shape[1], len(states[0])
            ended.append([state[running:] for state in states])
            joining = [state[before:running] for state in begun]
            states = [
                torch.cat([state[:running], new])
                for state, new in zip(states, joining, strict=True)
            ]
            output, states = direction(order, stretch, params, states)
            outputs.append(output.flatten(0, 1))
        ended.append(states)
        ends = [torch.cat(parts[::-1]) for parts in zip(*ended, strict=True)]
        return torch.cat(outputs[::-1] if order.is_reversed else outputs), ends

    return run


def _layers(direction: Callable[..., tuple[Tensor, States]]) -> Callable[..., Any]:
    """A call of torch's, given the function that runs one layer in one direction."""

    def run(
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        params: Sequence[Tensor],
        has_biases: Any,
        *others: Any,
    ) -> Any:
        if isinstance(has_biases, bool):
            return _stack(direction, input, hx, params, *others)
        # Of a packed sequence the batch sizes come second, and all else one place later.
        assert isinstance(hx, Tensor)
        by_stretches: Any = (packed(direction, hx), input, params, has_biases, *others[1:], False)
        return _stack(*by_stretches)

    return run


def _stack(
    direction: Direction,
    sequence: Tensor,
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """Run layers on top of each other."""
    starts = [hx] if isinstance(hx, Tensor) else list(hx)
    sides, time = 1 + int(bidirectional), int(batch_first)
    each = len(params) // (num_layers * sides)
    ends: list[States] = []
    for layer in range(num_layers):
        outputs = []
        for side in range(sides):
            number = layer * sides + side
            own = params[number * each : (number + 1) * each]
            begun = [start[number] for start in starts]
            found, end = direction(Order(time, bool(side)), sequence, own, begun)
            outputs.append(found)
            ends.append(end)
        sequence = torch.cat(outputs, -1) if sides == 2 else outputs[0]
        if dropout and train and layer + 1 < num_layers:
            sequence = _dropped(sequence, dropout, time)
    return sequence, *(torch.stack(states) for states in zip(*ends, strict=True))


def _direction(
    kind: Recurrence, order: Order, sequence: Tensor, params: Sequence[Tensor], begun: States
) -> tuple[Tensor, States]:
    w_i, w_h, *others = params
    b_i, b_h = others[:2] if len(others) > 1 else (None, None)
    a = F.linear(sequence, w_i, b_i)
    if len(others) % 2:
        return _projected(order, a, w_h, b_h, others[-1], begun)
    return recur(kind, order, a, begun, w_h, b_h)


def _projected(
    order: Order, a: Tensor, w_h: Tensor, b_h: Tensor | None, w_p: Tensor | None, begun: States
) -> tuple[Tensor, States]:
    (h, c), outputs = begun, []
    for a_t in order.moments(a):
        i, f, g, o = (a_t + F.linear(h, w_h, b_h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        h = h if w_p is None else F.linear(h, w_p)
        outputs.append(h)
    return torch.stack(outputs[::-1] if order.is_reversed else outputs, order.dim), (h, c)


def _by_cells(cell: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, States]]:
    """One layer in one direction as torch's cell at each time step: autograd can differentiate it
    twice, which it cannot with `recur`."""

    def direction(
        order: Order, sequence: Tensor, params: Sequence[Tensor], begun: States
    ) -> tuple[Tensor, States]:
        (h,), outputs = begun, []
        for x_t in order.moments(sequence):
            h = cell(x_t, h, *params)
            outputs.append(h)
        return torch.stack(outputs[::-1] if order.is_reversed else outputs, order.dim), (h,)

    return direction


def _lstm_by_steps(
    order: Order, sequence: Tensor, params: Sequence[Tensor], begun: States
) -> tuple[Tensor, States]:
    """The same for an LSTM, whose cell cannot be mapped over examples."""
    w_i, w_h, *others = params
    w_p = others.pop() if len(others) % 2 else None
    b_i, b_h = others or (None, None)
    return _projected(order, F.linear(sequence, w_i, b_i), w_h, b_h, w_p, begun)


def _lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_i: Tensor,
    w_h: Tensor,
    *biases: Tensor | None,
) -> tuple[Tensor, ...]:
    params = [w_i, w_h, *(b for b in biases if b is not None)]
    _, ends = _lstm_by_steps(Order(0, is_reversed=False), input[None], params, list(hx))
    return tuple(ends)


def _dropped(sequence: Tensor, p: float, time: int) -> Tensor:
    """With the draws in the order of time."""
    return torch.dropout(sequence.transpose(0, time).contiguous(), p, True).transpose(0, time)


def _one_step(kind: Recurrence) -> Callable[..., Any]:
    """A call of one of torch's cells."""

    def run(
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        w_i: Tensor,
        w_h: Tensor,
        b_i: Tensor | None = None,
        b_h: Tensor | None = None,
    ) -> Any:
        begun = [hx] if isinstance(hx, Tensor) else list(hx)
        a = F.linear(input, w_i, b_i)[None]
        _, ends = recur(kind, Order(0, is_reversed=False), a, begun, w_h, b_h)
        return ends[0] if isinstance(hx, Tensor) else tuple(ends)

    return run


RECURRENT: dict[Any, Callable[..., Any]] = {
    torch.rnn_tanh: _layers(partial(_direction, TANH)),
    torch.rnn_relu: _layers(partial(_direction, RELU)),
    torch.gru: _layers(partial(_direction, GRU)),
    torch.lstm: _layers(partial(_direction, LSTM)),
    torch.rnn_tanh_cell: _one_step(TANH),
    torch.rnn_relu_cell: _one_step(RELU),
    torch.gru_cell: _one_step(GRU),
    torch.lstm_cell: _one_step(LSTM),
}
"""What a call of torch is replaced by."""

TWICE_DIFFERENTIABLE: dict[Any, Callable[..., Any] | None] = {
    torch.rnn_tanh: _layers(_by_cells(torch.rnn_tanh_cell)),
    torch.rnn_relu: _layers(_by_cells(torch.rnn_relu_cell)),
    torch.gru: _layers(_by_cells(torch.gru_cell)),
    torch.lstm: _layers(_lstm_by_steps),
    torch.lstm_cell: _lstm_cell,
    **dict.fromkeys([torch.rnn_tanh_cell, torch.rnn_relu_cell, torch.gru_cell], None),
}
"""The same where a gradient is differentiated; None: torch's own call, mapped over examples."""
