"""Copies of parameters, one for each example or row: what autograd makes of them is the gradient.

P_i = p for each example i,    g_i = dL/dP_i
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from anybatch.ledger.contractions.base import Contraction
from anybatch.ledger.contractions.calls import broadcast_size
from anybatch.ledger.contractions.elementwise import Broadcast, Ready
from anybatch.ledger.contractions.placement import Meeting, Placement
from anybatch.ledger.gradient_taps import copied

__all__ = ["Copies"]


class Copies(NamedTuple):
    """Makes copies whose gradients are delivered.

    Args:
        receive: see `intercept`.
        note: counts a use of a parameter.
        const: makes a constant of a parameter.
        num_examples: B.
    """

    receive: Callable[..., None]
    note: Callable[[Meeting], None]
    const: Callable[[Tensor], Tensor]
    num_examples: int

    def lay(self, p: Tensor, meeting: Meeting, placement: Placement, shape: Any) -> Tensor:
        """The copies of a parameter, laid so that they broadcast to a shape."""
        if placement.kind == "rows":
            return self._of_rows(p, meeting, placement, shape)
        aligned = [broadcast_size(p, k, len(shape)) for k in range(len(shape))]
        k, size = placement.dim, self.num_examples
        copies = self.of_examples(p, meeting, placement).reshape(size, *aligned)
        if placement.kind == "dim":
            return placement.back(copies.squeeze(k + 1))
        rows = [-1] * len(shape)
        rows[k] = shape[k] // size
        return placement.back(copies.expand(size, *rows))

    def of_examples(self, p: Tensor, meeting: Meeting, layout: Placement | None = None) -> Tensor:
        """[B, ...], one copy of a parameter for each example, to be laid out in some way."""
        self.note(meeting)

        def arrive(d: Tensor) -> None:
            self.receive(meeting, Placement("dim", layout=layout), lambda _: Ready(d), d)

        return copied(self.const(p), (self.num_examples, *p.shape), arrive)

    def _of_rows(self, p: Tensor, meeting: Meeting, rows: Placement, shape: Any) -> Tensor:
        """A copy of a parameter for each row of a shape, whoever it belongs to."""
        self.note(meeting)
        size = self.num_examples

        def arrive(d: Tensor) -> None:
            def make(owned: Placement) -> Contraction:
                return Broadcast(owned.first(d, size), tuple(p.shape))

            self.receive(meeting, rows, make, d)

        return copied(self.const(p), shape, arrive)
