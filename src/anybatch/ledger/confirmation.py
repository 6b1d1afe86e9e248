"""Confirmation, at a step, that the loss of each example reaches only its own rows.

    all examples with weight 1          rows d_i
    example i with weight r_i < 1       rows r_i d_i, if no row belongs to another example

Two examples differ in a digit of their number, and r_i = q^digit. One backward pass tests each
digit: 256 digits with q = 2^(-1/32), or 8 digits with q = 1/2 if gradients are narrower than
float32. So one or two more backward passes show whether rows have changed places. A hook on an
activation that is not linear breaks the proportion too, so an exact test follows: it takes some
examples backward alone, half of them for each bit of their number, and the rows of all others must
be 0.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from anybatch import _torch
from anybatch.errors import LedgerError
from anybatch.ledger.contractions.calls import Receive, Uses
from anybatch.ledger.contractions.placement import (
    Placement,
    Plan,
    Site,
    is_consistent,
    moved_rows_error,
)
from anybatch.ledger.row_owners import Owners, Scales, iterate_masks
from anybatch.ledger.unplaced import UnplacedError

__all__ = [
    "RowCheck",
    "iterate_nodes",
    "list_leaves",
    "preserve_grads",
    "repeat_backward",
    "run_backward",
    "set_grads_aside",
]

Run = Callable[[Callable[[], object], Receive], None]
"""Run a backward pass, and hand its gradients to a receiver."""


def run_backward(
    values: Sequence[Tensor], gradients: Sequence[Tensor], *, keeps_graph: bool = False
) -> None:
    """Run a backward pass that adds to `.grad`, by the function behind `Tensor.backward`."""
    _torch.run_backward(tuple(values), tuple(gradients), keeps_graph, False, (), True, True)


def repeat_backward(values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Run a backward pass and keep its graph for another one.

    Raises:
        LedgerError: torch cannot keep it, for instance because a tensor was changed in place.
    """
    try:
        run_backward(values, gradients, keeps_graph=True)
    except RuntimeError as error:
        raise LedgerError(
            f"The ledger has to go back through the graph of the losses several times, and torch "
            f"does not allow it: {error} Leave the model unobserved."
        ) from error


class RowCheck:
    """Repeated backward passes that show which example each row belongs to.

    Args:
        num_examples: B.
        plan: placements of the forward pass.
        run: runs a backward pass.
    """

    def __init__(self, num_examples: int, plan: Plan, run: Run) -> None:
        self._size, self._plan, self._run = num_examples, plan, run
        self._owners: Owners | None = None
        self.scales: Scales | None = None
        """Gradients with powers of two; None: the owners come from masks."""

    def find_scales(self, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Take the examples backward, multiplied by powers of two."""
        scales = Scales(self._size, values[0].device)

        def receive(uses: Uses, placement: Placement, d: Tensor) -> None:
            scales.add_gradient(d)

        for factors in scales.iterate_factors():
            self._go_back(values, gradients, factors, receive)
        self.scales = scales

    def find_misplaced(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> set[tuple[Site, Placement]]:
        """Find the sites where losses of some examples reach rows of others.

        Some pass separates any two examples. The owners of rows are known afterwards.
        """
        self._owners = owners = Owners(self._size)
        wrong: set[tuple[Site, Placement]] = set()
        for mask in iterate_masks(self._size, values[0].device):
            owners.begin_pass()
            wrong |= self._test_mask(values, gradients, mask, owners)
        return wrong

    def _test_mask(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor], mask: Tensor, owners: Owners
    ) -> set[tuple[Site, Placement]]:
        """Take the examples of a mask backward; return the sites where they reach others."""
        wrong: set[tuple[Site, Placement]] = set()

        def receive(uses: Uses, placement: Placement, d: Tensor) -> None:
            if placement.kind == "rows":
                is_right = owners.add_gradient(placement.flatten_rows(d))
            else:
                is_right = is_consistent(placement, d, mask)
            if not is_right and bool(d.isfinite().all()):  # an overflow mixes all rows
                wrong.update((site, placement.layout or placement) for site, _ in uses)

        self._go_back(values, gradients, mask, receive)
        return wrong

    def confirm(self, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Check that the loss of each example reaches only its own rows.

        Raises:
            UnplacedError: it reaches others. The plan has another placement then.
        """
        plan = self._plan
        if not plan.unconfirmed and not plan.has_rows and self._is_in_proportion(values, gradients):
            return
        wrong = self.find_misplaced(values, gradients)
        for site, placement in wrong:
            plan.reject(site, placement)
        for site, placement in wrong:
            raise UnplacedError(
                f"Losses of some examples reach rows of others at the {site}, whose examples "
                f"were taken to be at {placement}. Rows are mixed there (packed, routed, sorted). "
                f"Keep examples along a dimension of their own, or leave the model unobserved.",
                is_replaced=True,
            )
        plan.unconfirmed.clear()

    def resolve(self, site: Site, placement: Placement, d: Tensor) -> Placement:
        """Return a placement with the owners of its rows, if it has any.

        Raises:
            DoubtError: powers of two do not show the owners.
            UnplacedError: no pass has found the owners.
        """
        if self.scales is not None:
            return self.scales.find_owners(placement, d)
        if placement.kind != "rows":
            return placement
        if self._size == 1:
            return placement.with_one_owner(d)
        rows = placement.flatten_rows(d)
        owners = None if self._owners is None else self._owners.pop_owners(rows)
        if owners is None:
            raise moved_rows_error(site)
        return placement.with_owners(owners)

    def _is_in_proportion(self, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
        """Return whether all rows are proportional to the weight of their example."""
        numbers = torch.arange(self._size, device=values[0].device)
        ones = torch.ones_like(numbers, dtype=torch.float32)
        plain = self._row_norms(values, gradients, ones)
        is_narrow = any(norms.dtype.itemsize < 4 for norms in plain)
        base, q, slack = (8, 0.5, 0.2) if is_narrow else (256, 2 ** (-1 / 32), 0.005)
        while bool((numbers > 0).any()):
            weights = q ** (numbers % base).float()
            scaled = self._row_norms(values, gradients, weights)
            for before, after in zip(plain, scaled, strict=True):
                expected = before.float() * weights
                is_near = (after.float() - expected).abs() <= slack * expected  # False for nan
                if not bool(is_near.all()):
                    return False
            numbers = numbers // base
        return True

    def _row_norms(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor], weights: Tensor
    ) -> list[Tensor]:
        """Compute |d_i| [B] at each site, with example i weighed by w_i [B]."""
        norms: list[Tensor] = []

        def receive(uses: Uses, placement: Placement, d: Tensor) -> None:
            rows = placement.move_first(d, self._size).reshape(self._size, -1)
            norms.append(torch.linalg.vector_norm(rows, dim=1))

        self._go_back(values, gradients, weights, receive)
        return norms

    def _go_back(
        self,
        values: Sequence[Tensor],
        gradients: Sequence[Tensor],
        weights: Tensor,
        receive: Receive,
    ) -> None:
        """Go backward with weights [B], and keep the graph."""
        weighed = [g * weights.to(g.dtype).view(-1, *[1] * (g.ndim - 1)) for g in gradients]
        self._run(lambda: repeat_backward(values, weighed), receive)


@contextmanager
def preserve_grads(values: Iterable[Tensor], *, but: Collection[Tensor] = ()) -> Iterator[None]:
    """Restore `.grad` of the leaves of a graph afterwards, except for some tensors.

    The leaves can be inputs whose gradient the user needs, or parameters outside of the model.
    """
    excluded = {id(x) for x in but}
    leaves = list_leaves(v.grad_fn for v in values)
    with set_grads_aside([x for x in leaves if id(x) not in excluded]):
        yield


@contextmanager
def set_grads_aside(leaves: list[Tensor]) -> Iterator[None]:
    """Clear `.grad` of tensors within the context, and restore it afterwards."""
    before = [x.grad for x in leaves]
    for x in leaves:
        x.grad = None
    try:
        yield
    finally:
        for x, gradient in zip(leaves, before, strict=True):
            x.grad = gradient


def list_leaves(nodes: Iterable[Any]) -> list[Tensor]:
    """List the leaves of a graph, from some nodes on."""
    return [node.variable for node in iterate_nodes(nodes) if hasattr(node, "variable")]


def iterate_nodes(
    nodes: Iterable[Any], *, is_end: Callable[[Any], bool] = lambda _: False
) -> Iterator[Any]:
    """Yield each node of autograd's graph once, from some nodes up to and including the ends."""
    todo, visited = list(nodes), set()
    while todo:
        node = todo.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        yield node
        if not is_end(node):
            todo += [parent for parent, _ in node.next_functions]
