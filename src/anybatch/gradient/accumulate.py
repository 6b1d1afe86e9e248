"""The sum of the parts' gradients, in at least float32, rounded to the parameter's type once.

running   the parts one after the other; then the ranks, in an order that depends on both
by tree   the grains in the order of `tree`, which nothing but their number changes
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from anybatch import distributed
from anybatch.distributed import ProcessGroup
from anybatch.errors import ModelError
from anybatch.gradient import tree
from anybatch.gradient.tree import Node, Run
from anybatch.layout import Part

__all__ = ["Accumulator", "TreeAccumulator"]


class Accumulator:
    """Collects what each backward pass leaves in `.grad`, from nothing."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._narrow = {name: p for name, p in parameters.items() if p.dtype.itemsize < 4}
        self.sums: dict[str, Tensor] = {}
        """By name, in the order of the parameters, once `finish` has been called."""
        self.clear()

    def clear(self) -> None:
        """Start again from nothing."""
        self.sums = {}
        for p in self._parameters.values():
            p.grad = None

    def add(self, part: Part) -> None:
        """Take in a part's backward pass. Float32 and wider types add up in `.grad` by
        themselves."""
        for name, p in self._narrow.items():
            if p.grad is not None:
                wide = _dense(name, p.grad).float()
                self.sums[name] = wide + self.sums[name] if name in self.sums else wide
                p.grad = None

    def finish(self) -> None:
        """Complete the sums, with zeros for parameters that nothing has reached."""
        found, self.sums = self.sums, {}
        for name, p in self._parameters.items():
            if p.grad is not None:
                self.sums[name] = _dense(name, p.grad)
            elif name in found:
                self.sums[name] = found[name]
            else:
                self.sums[name] = _zeros(p)

    def sum_over_ranks(self, group: ProcessGroup | None) -> None:
        """Add up what all ranks hold; once, and after `finish`."""
        distributed.all_sum(list(self.sums.values()), group)

    def deliver(self) -> None:
        """Leave the sums in `.grad`."""
        for name, p in self._parameters.items():
            if p.grad is not self.sums[name]:
                p.grad = self.sums[name].to(p.dtype)


class TreeAccumulator(Accumulator):
    """The same, of parts that are grains: every grain is a leaf of the fixed tree."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], runs: Sequence[Run]) -> None:
        """Take the grains that each rank holds."""
        self._runs = runs
        super().__init__(parameters)

    def clear(self) -> None:
        super().clear()
        self._nodes: list[Node[list[Tensor]]] = []

    def add(self, part: Part) -> None:
        assert part.grain is not None
        leaf = [self._taken(name, p) for name, p in self._parameters.items()]
        self._nodes = tree.appended(self._nodes, Node(part.grain, 0, leaf), tree.add)

    def finish(self) -> None:
        pass

    def sum_over_ranks(self, group: ProcessGroup | None) -> None:
        like = [p.new_empty(1, dtype=_wide(p)).expand(p.shape) for p in self._parameters.values()]
        sums = tree.summed_over_ranks(self._nodes, self._runs, like, group)
        self.sums = dict(zip(self._parameters, sums, strict=True))
        self._nodes = []

    def _taken(self, name: str, p: nn.Parameter) -> Tensor:
        """What one grain has left in `.grad`, and it alone."""
        found, p.grad = p.grad, None
        return _zeros(p) if found is None else _dense(name, found).to(_wide(p))


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _zeros(p: Tensor) -> Tensor:
    return torch.zeros_like(p, dtype=_wide(p))


def _dense(name: str, gradient: Tensor) -> Tensor:
    if gradient.layout != torch.strided:
        raise ModelError(
            f"the gradient of {name} is sparse, expected a dense one: a penalty, a norm "
            f"and a sum over ranks need every element. Use Embedding(..., sparse=False)."
        )
    return gradient
