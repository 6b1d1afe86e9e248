"""Recurrent layers, written as products that the ledger can watch.

`a = W_i x_t + b_i` for all t at once is a linear layer; `recurrent_cells` does the rest. An LSTM
with a projection runs step by step,

    i, f, o = sigmoid(a + b),  g = tanh(a + b),    b = W_h h_(t-1) + b_h
    c_t = f c_(t-1) + i g,  h_t = W_p (o tanh(c_t))

and dropout between layers draws as torch does. A packed sequence holds its rows by time step, the
longest sequence first. Between two time steps at which sequences end or begin, the rows are a
padded batch [T, b, d]: a stretch. Forward in time b falls, and the states of ended sequences are
final. Backward in time b grows, and new sequences bring their initial states.

Source: torch.nn.RNN, GRU, LSTM and torch.nn.utils.rnn.PackedSequence, documentation.
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
    Cell,
    States,
    TimeAxis,
    run_recurrence,
)

__all__ = ["RECURRENT", "TWICE_DIFFERENTIABLE"]

Direction = Callable[[TimeAxis, Tensor, Sequence[Tensor], States], tuple[Tensor, States]]
"""One layer in one direction. It computes outputs and final states of a sequence [T, B, d] from
(time, sequence, parameters, initial states)."""


def _make_layers(direction: Direction) -> Callable[..., Any]:
    """Return a replacement for torch's function, made of the function for one direction."""

    def run(
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        params: Sequence[Tensor],
        has_biases: Any,
        *others: Any,
    ) -> Any:
        if isinstance(has_biases, bool):
            return _run_layers(direction, input, hx, params, *others)
        # For a packed sequence the batch sizes are the second argument, and the others follow.
        assert isinstance(hx, Tensor)
        settings: Any = (input, params, has_biases, *others[1:], False)
        return _run_layers(_make_packed(direction, hx), *settings)

    return run


def _run_layers(
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
    initial = [hx] if isinstance(hx, Tensor) else list(hx)
    num_directions, dim = 1 + int(bidirectional), int(batch_first)
    num_params = len(params) // (num_layers * num_directions)
    final: list[States] = []
    for layer in range(num_layers):
        outputs = []
        for side in range(num_directions):
            k = layer * num_directions + side
            output, states = direction(
                TimeAxis(dim, bool(side)),
                sequence,
                params[k * num_params : (k + 1) * num_params],
                [state[k] for state in initial],
            )
            outputs.append(output)
            final.append(states)
        sequence = torch.cat(outputs, -1) if num_directions == 2 else outputs[0]
        if dropout and train and layer + 1 < num_layers:
            # Transposed, so that the random numbers come in the same order as torch's.
            sequence = sequence.transpose(0, dim).contiguous()
            sequence = torch.dropout(sequence, dropout, True).transpose(0, dim)
    return sequence, *(torch.stack(states) for states in zip(*final, strict=True))


def _make_packed(direction: Direction, batch_sizes: Tensor) -> Direction:
    """Return the same layer for packed rows [N, d], given the number of sequences at each step."""
    sizes, lengths = (x.tolist() for x in torch.unique_consecutive(batch_sizes, return_counts=True))
    shapes = list(zip(lengths, sizes, strict=True))
    counts = [t * b for t, b in shapes]

    def run(
        time: TimeAxis, rows: Tensor, params: Sequence[Tensor], initial: States
    ) -> tuple[Tensor, States]:
        stretches = [
            part.view(*shape, *part.shape[1:])
            for part, shape in zip(torch.split(rows, counts), shapes, strict=True)
        ]
        outputs = []
        final: list[States] = []
        states: States = [state[:0] if time.is_reversed else state for state in initial]
        for stretch in stretches[::-1] if time.is_reversed else stretches:
            num_running, num_before = stretch.shape[1], len(states[0])
            final.append([state[num_running:] for state in states])
            new = [state[num_before:num_running] for state in initial]
            states = [
                torch.cat([state[:num_running], begin])
                for state, begin in zip(states, new, strict=True)
            ]
            output, states = direction(time, stretch, params, states)
            outputs.append(output.flatten(0, 1))
        final.append(states)
        final_states = [torch.cat(parts[::-1]) for parts in zip(*final, strict=True)]
        return torch.cat(outputs[::-1] if time.is_reversed else outputs), final_states

    return run


def _run_direction(
    cell: Cell, time: TimeAxis, sequence: Tensor, params: Sequence[Tensor], initial: States
) -> tuple[Tensor, States]:
    w_i, w_h, *others = params
    b_i, b_h = others[:2] if len(others) > 1 else (None, None)
    a = F.linear(sequence, w_i, b_i)
    if len(others) % 2:
        return _run_projected(time, a, w_h, b_h, others[-1], initial)
    return run_recurrence(cell, time, a, initial, w_h, b_h)


def _run_projected(
    time: TimeAxis, a: Tensor, w_h: Tensor, b_h: Tensor | None, w_p: Tensor | None, initial: States
) -> tuple[Tensor, States]:
    """Run an LSTM step by step, with a projection if there is one."""
    (h, c), outputs = initial, []
    for a_t in time.unbind(a):
        i, f, g, o = (a_t + F.linear(h, w_h, b_h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        h = h if w_p is None else F.linear(h, w_p)
        outputs.append(h)
    return _stack_steps(time, outputs), (h, c)


def _stack_steps(time: TimeAxis, outputs: list[Tensor]) -> Tensor:
    return torch.stack(outputs[::-1] if time.is_reversed else outputs, time.dim)


def _make_direction(cell: Callable[..., Tensor]) -> Direction:
    """Return one direction that calls torch's cell at each time step.

    Autograd can differentiate it twice, unlike `run_recurrence`.
    """

    def run(
        time: TimeAxis, sequence: Tensor, params: Sequence[Tensor], initial: States
    ) -> tuple[Tensor, States]:
        (h,), outputs = initial, []
        for x_t in time.unbind(sequence):
            h = cell(x_t, h, *params)
            outputs.append(h)
        return _stack_steps(time, outputs), (h,)

    return run


def _run_lstm_steps(
    time: TimeAxis, sequence: Tensor, params: Sequence[Tensor], initial: States
) -> tuple[Tensor, States]:
    """Run an LSTM step by step, since `vmap` cannot map torch's LSTM cell over examples."""
    w_i, w_h, *others = params
    w_p = others.pop() if len(others) % 2 else None
    b_i, b_h = others or (None, None)
    return _run_projected(time, F.linear(sequence, w_i, b_i), w_h, b_h, w_p, initial)


def _run_lstm_cell(
    input: Tensor, hx: Sequence[Tensor], w_i: Tensor, w_h: Tensor, *biases: Tensor | None
) -> tuple[Tensor, ...]:
    params = [w_i, w_h, *(b for b in biases if b is not None)]
    time = TimeAxis(0, is_reversed=False)
    return tuple(_run_lstm_steps(time, input[None], params, list(hx))[1])


def _make_cell(cell: Cell) -> Callable[..., Any]:
    """Return a replacement for one of torch's cells."""

    def run(
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        w_i: Tensor,
        w_h: Tensor,
        b_i: Tensor | None = None,
        b_h: Tensor | None = None,
    ) -> Any:
        initial = [hx] if isinstance(hx, Tensor) else list(hx)
        a = F.linear(input, w_i, b_i)[None]
        time = TimeAxis(0, is_reversed=False)
        _, states = run_recurrence(cell, time, a, initial, w_h, b_h)
        return states[0] if isinstance(hx, Tensor) else tuple(states)

    return run


RECURRENT: dict[Any, Callable[..., Any]] = {
    torch.rnn_tanh: _make_layers(partial(_run_direction, TANH)),
    torch.rnn_relu: _make_layers(partial(_run_direction, RELU)),
    torch.gru: _make_layers(partial(_run_direction, GRU)),
    torch.lstm: _make_layers(partial(_run_direction, LSTM)),
    torch.rnn_tanh_cell: _make_cell(TANH),
    torch.rnn_relu_cell: _make_cell(RELU),
    torch.gru_cell: _make_cell(GRU),
    torch.lstm_cell: _make_cell(LSTM),
}
"""Replacement of each recurrent function of torch."""

TWICE_DIFFERENTIABLE: dict[Any, Callable[..., Any] | None] = {
    torch.rnn_tanh: _make_layers(_make_direction(torch.rnn_tanh_cell)),
    torch.rnn_relu: _make_layers(_make_direction(torch.rnn_relu_cell)),
    torch.gru: _make_layers(_make_direction(torch.gru_cell)),
    torch.lstm: _make_layers(_run_lstm_steps),
    torch.lstm_cell: _run_lstm_cell,
    **dict.fromkeys([torch.rnn_tanh_cell, torch.rnn_relu_cell, torch.gru_cell], None),
}
"""Replacement of each if a gradient is differentiated; None: torch's function, mapped by `vmap`."""
