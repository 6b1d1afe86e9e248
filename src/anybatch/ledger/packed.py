"""Recurrent layers over packed sequences: rows by time step, the longest sequence first.

    t_0 .. t_1 - 1    time steps at which the same b sequences are still running

Such a stretch of rows is a padded batch [t_1 - t_0, b, d] as it stands. Forwards in time b falls,
and the states of those that end are final; backwards b grows, and those that join bring their
initial states.

Source: torch.nn.utils.rnn.PackedSequence, documentation.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anybatch.ledger.recurrence import Order, States

__all__ = ["Direction", "packed"]

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
