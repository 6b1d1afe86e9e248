"""Parameters, and tensors computed from parameters alone: weight norm, a slice, a low-rank product.

    M = f(p):      g_i (of p) = (df/dp)^T g_i (of M)

The batch meets M in an operation. The ledger treats M like a parameter and leads the gradients of M
back to p afterwards.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self, final

import torch
from torch import Tensor

from anybatch._torch import tree_leaves
from anybatch.ledger.contractions.base import Contraction
from anybatch.ledger.contractions.placement import Site

__all__ = ["Derived", "ParameterTracker", "ignore_vmap_warning"]


class ParameterTracker:
    """Names and uses of the parameters, and of the tensors that a pass computes from them.

    Args:
        parameters: the parameters to track, by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        self.constants: dict[str, Tensor] | None = None
        """Leaves that replace parameters in a checked pass and collect the gradients of plain
        autograd; None: constants without gradients replace them."""
        self.reset()

    def reset(self) -> None:
        """Forget the last forward pass."""
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.uses: dict[str, int] = {}
        """Number of uses of each parameter and derived tensor."""
        self.derived: dict[str, Tensor] = {}
        """Derived tensors. The tracker holds them, so that Python does not reuse their ids."""
        self.roots = {name: {name} for name in self.parameters}
        """Names of the parameters that a tensor was computed from."""
        self.sources: set[str] = set()
        """Names of the parameters that some tensor was computed from."""
        self.is_forward = True
        """False in a backward pass, where checkpointing repeats uses that are counted already."""
        self._labels = {name: name for name in self.parameters}

    def __contains__(self, tensor: object) -> bool:
        return id(tensor) in self.names

    def contains_any(self, values: Any) -> bool:
        """Return whether a parameter is among values or nested lists of values."""
        names = self.names
        for value in values:
            if id(value) in names:
                return True
            if isinstance(value, list | tuple) and self.contains_any(value):
                return True
        return False

    def find_label(self, tensor: Tensor) -> str:
        """Return the name of a tensor that is the same in every pass."""
        return self._labels[self.names[id(tensor)]]

    def count_use(self, site: Site) -> None:
        """Count one use of a parameter."""
        if self.is_forward:
            self.uses[site.parameter] = self.uses.get(site.parameter, 0) + 1

    def is_indirect(self, name: str) -> bool:
        """Return whether a name is that of a derived tensor, or of a parameter behind one."""
        return name in self.derived or name in self.sources

    def detach(self, tensor: Tensor) -> Tensor:
        """Return a parameter as a constant, and any other tensor unchanged."""
        name = self.names.get(id(tensor))
        if name is None:
            return tensor
        if self.constants is None:
            return tensor.detach()
        if name not in self.constants:
            self.constants[name] = tensor.detach().requires_grad_()
        return self.constants[name]

    def add_derived(self, operation: str, result: Any, operands: Sequence[Tensor]) -> None:
        """Track the tensors of a result that was computed from parameters alone."""
        names = [self.names[id(t)] for t in operands]
        roots = set().union(*(self.roots[name] for name in names))
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor) or leaf in self:
                continue
            self.sources |= roots
            if leaf.requires_grad:
                label = f"{operation}({self._labels[names[0]]})"
                name = f"{label}#{len(self.derived)}"
                self.names[id(leaf)], self._labels[name], self.roots[name] = name, label, roots
                self.derived[name] = leaf


@final
@dataclass(frozen=True, slots=True)
class Derived(Contraction):
    """Use of a parameter through a tensor that was computed from it."""

    parameter: Tensor
    tensor: Tensor  # with a graph that leads to the parameter
    use: Contraction  # of the tensor

    def __len__(self) -> int:
        return len(self.use)

    def take(self, start: int, stop: int) -> Self:
        return replace(self, use=self.use.take(start, stop))

    def gradients(self) -> Tensor:
        return self._go_back(self.use.gradients(), batched=True)

    def sum_gradients(self, c: Tensor | None) -> Tensor:
        return self._go_back(self.use.sum_gradients(c), batched=False)

    def widen(self) -> Self:
        return replace(self, use=self.use.widen())

    def _go_back(self, d: Tensor, *, batched: bool) -> Tensor:
        with torch.enable_grad(), ignore_vmap_warning():
            (gradient,) = torch.autograd.grad(
                self.tensor,
                self.parameter,
                d.to(self.tensor.dtype),
                retain_graph=True,
                is_grads_batched=batched,
            )
        return gradient


@contextmanager
def ignore_vmap_warning() -> Iterator[None]:
    """Ignore the warning that vmap runs an operation in a loop; the result is the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield
