"""Gradients of the examples one after the other, by plain autograd.

    g_i = gradient of c_i v_i alone,    i = 1 .. B,    through one graph

It takes B backward passes and knows nothing of the operations in between, so it is exact for
scripted code, functions written in C++, second derivatives and whatever else cannot be taken apart
by example. `.grad` comes from one more pass with all c_i, as it would without the ledger.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from anybatch.ledger.collect import Collected
from anybatch.ledger.contractions.base import square
from anybatch.ledger.contractions.elementwise import Ready

__all__ = ["OneByOne"]


class OneByOne:
    """A forward pass that is left as it is, and B backward passes through it.

    Args:
        parameters: the trainable ones, by name.
        num_examples: B.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], num_examples: int) -> None:
        self._parameters, self._size = parameters, num_examples

        self.mode: AbstractContextManager[object] = nullcontext()
        """The context of the forward pass."""

    def backward(
        self,
        values: Sequence[Tensor],
        gradients: Sequence[Tensor],
        *,
        weights: Tensor | None = None,
        weigh: Callable[[Tensor], Tensor] | None = None,
        keep: bool = False,
        whole: bool = False,
    ) -> Collected:
        """Go back from the values, and add sum_i c_i g_i to what is in `.grad`.

        Args:
            values: [B, ...] each, with a graph.
            gradients: their weights on the way back, shaped like the values.
            weights: c [B] of the sum in `.grad`; None: 1 each.
            weigh: c from sum |g_i|^2 [B], where they are not known before.
            keep: whether the g_i are kept, for a second look.
            whole: whether the g_i are results themselves.
        """
        found = Collected()
        rows = [self._one(values, gradients, i, whole or keep) for i in range(self._size)]
        for name in self._parameters:
            found.squares[name] = torch.stack([squares[name] for squares, _ in rows])
            if whole or keep:
                stacked = torch.stack([own[name] for _, own in rows])
                found.gradients[name], found.uses[name] = stacked, [Ready(stacked)]
        if weigh is not None:
            weights = weigh(torch.stack(list(found.squares.values())).sum(0))
        starts = [g if weights is None else _rows_times(g, weights) for g in gradients]
        torch.autograd.backward(list(values), starts)
        if not whole:
            found.gradients.clear()
        if not keep:
            found.uses.clear()
        return found

    def _one(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor], example: int, is_kept: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """|g_i|^2 and, if they are kept, g_i of one example, by parameter."""
        chosen = torch.zeros(self._size, device=values[0].device)
        chosen[example] = 1
        starts = [_rows_times(g, chosen) for g in gradients]
        found = self._gradients(values, starts)
        own = {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(self._parameters.items(), found, strict=True)
        }
        squares = {name: square(g.reshape(1, -1))[0] for name, g in own.items()}
        return squares, own if is_kept else {}

    def _gradients(
        self, values: Sequence[Tensor], starts: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """The gradients of all parameters, which leave `.grad` as it is."""
        parameters = list(self._parameters.values())
        try:
            return torch.autograd.grad(
                list(values), parameters, starts, retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
        # Reentrant activation checkpointing knows no other way than through `.grad`.
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        torch.autograd.backward(list(values), starts, retain_graph=True)
        found = [p.grad for p in parameters]
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad
        return found


def _rows_times(rows: Tensor, factors: Tensor) -> Tensor:
    return rows * factors.to(rows).view(-1, *[1] * (rows.ndim - 1))
