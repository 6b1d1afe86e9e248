"""Calls of torch that take parameters, and the batch that passes through them.

    P_i = p for each example i,    y_i = f(x_i, P_i),    g_i = dL/dP_i

A handler gets a `Call` and the `Context` of the batch. It runs the call with its parameters as
constants or as one copy per example, and passes their gradients to the context's receiver.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from anybatch._torch import tree_leaves, tree_map
from anybatch.ledger.contractions.base import Contraction, PerExample, RuleResult
from anybatch.ledger.contractions.derived import ParameterTracker
from anybatch.ledger.contractions.placement import Placement, Plan, Site, list_placements
from anybatch.ledger.gradient_taps import copy_constant, tap
from anybatch.ledger.unplaced import UnplacedError

__all__ = ["Call", "Context", "Receive", "as_factor", "broadcast_size"]

Receive = Callable[[Site, Placement, Callable[[Placement], Contraction], Tensor], None]
"""Takes the gradient of an operation's output or of a parameter's copies in the backward pass, with
the site, its placement, and a function that makes the contraction once rows have owners."""


class Call(NamedTuple):
    """One call of a torch function that takes parameters or tensors derived from them."""

    func: Any
    args: Any
    kwargs: Any
    data: list[Tensor]  # operands that are no parameters
    parameters: list[Tensor]
    sites: dict[int, Site]  # by the id of each parameter

    def run(self) -> Any:
        """Run the call unchanged."""
        return self.func(*self.args, **self.kwargs)

    @property
    def site(self) -> Site:
        """Site of the first parameter, which decides the placement."""
        return next(iter(self.sites.values()))

    @property
    def is_in_place(self) -> bool:
        """Whether the call writes into a parameter or a derived tensor."""
        name = self.func.__name__
        is_write = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        return is_write and id(self.args[0]) in self.sites

    def run_with(self, replace: Callable[[Tensor], Tensor]) -> Any:
        """Run the call with each parameter replaced by `replace(parameter)`."""

        def map_leaf(leaf: Any) -> Any:
            return replace(leaf) if id(leaf) in self.sites else leaf

        args, kwargs = tree_map(map_leaf, (self.args, self.kwargs))
        return self.func(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Context:
    """The examples that pass through the model at present."""

    tracker: ParameterTracker
    num_examples: int  # 0: the next calls process no examples
    plan: Plan
    receive: Receive

    def place(
        self, call: Call, shape: tuple[int, ...], leading: int, *, by_rows: bool = False
    ) -> Placement | None:
        """Choose where the examples lie in the first dimensions of a tensor; None: nowhere."""
        possible = list_placements(shape, self.num_examples, leading)
        if by_rows and leading:
            possible.append(Placement("rows", leading))
        return self.plan.choose_placement(call.site, possible, self.num_examples)

    def place_broadcast(
        self, call: Call, shape: tuple[int, ...], *, by_rows: bool = False
    ) -> Placement | None:
        """Choose where the examples lie in the shape that all parameters are broadcast to.

        The parameters must be repeated along the dimension of the examples.
        """
        ndim = len(shape)
        possible = [
            place
            for place in list_placements(shape, self.num_examples, ndim)
            if all(broadcast_size(p, place.dim, ndim) == 1 for p in call.parameters)
        ]
        leading = min(_count_repeated(p, ndim) for p in call.parameters)
        if by_rows and leading:
            possible.append(Placement("rows", leading))
        return self.plan.choose_placement(call.site, possible, self.num_examples)

    def copy_parameter(self, p: Tensor, site: Site, layout: Placement | None = None) -> Tensor:
        """Make one copy of a parameter per example, [B, ...], whose gradients are received.

        Args:
            layout: where the caller lays the copies out, if not along the first dimension.
        """
        self.tracker.count_use(site)

        def receive(d: Tensor) -> None:
            self.receive(site, Placement("dim", layout=layout), lambda _: PerExample(d), d)

        return copy_constant(self.tracker.detach(p), (self.num_examples, *p.shape), receive)

    def run_single(self, call: Call) -> Any:
        """Run a call of a single example, which owns everything in it."""
        copies = {id(p): self.copy_parameter(p, call.sites[id(p)])[0] for p in call.parameters}
        return call.run_with(lambda p: copies[id(p)])

    def run_shared(self, call: Call) -> Any:
        """Run a call that does not contain the examples, and track its result as derived.

        Raises:
            UnplacedError: the operands contain the examples all the same.
        """
        if self.num_examples == 1 and not call.is_in_place:
            return self.run_single(call)
        result = call.run()
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(t.requires_grad for t in leaves) and any(t.requires_grad for t in call.data):
            self._refuse_shared(call)
        return self.run_derived(call, result)

    def run_derived(self, call: Call, result: Any) -> Any:
        """Track the result of a call as computed from parameters alone, and return it."""
        self.tracker.add_derived(call.func.__name__, result, call.parameters)
        return result

    def run_rule(self, call: Call, result: RuleResult) -> Any:
        """Receive the gradients of a call that a rule has computed."""
        shape = tuple(result.output.shape)
        placement = self.place(call, shape, result.leading, by_rows=True)
        if placement is None:
            return self.run_shared(call)
        uses = [(call.sites[id(p)], make) for p, make in result.uses if id(p) in call.sites]
        for site, _ in uses:
            self.tracker.count_use(site)

        def receive(d: Tensor, *saved: Tensor) -> None:
            def make_placed(make: Callable[..., Contraction], place: Placement) -> Contraction:
                factors = (place.move_first(as_factor(x, d), self.num_examples) for x in saved)
                return make(place.move_first(d, self.num_examples), *factors)

            for site, make in uses:
                self.receive(site, placement, partial(make_placed, make), d)

        return tap(result.output, receive, *result.saved)

    def _refuse_shared(self, call: Call) -> NoReturn:
        shapes = ", ".join(str(tuple(t.shape)) for t in call.data)
        raise UnplacedError(
            f"The {call.site} takes a tensor of shape {shapes} in a batch of "
            f"{self.num_examples} examples. No part of that tensor belongs to one example alone. "
            f"Are rows of different examples mixed there (packed, routed, sorted), or does the "
            f"model couple examples? Keep examples along a dimension of their own, freeze the "
            f"parameter, or leave the model unobserved."
        )


def broadcast_size(p: Tensor, dim: int, ndim: int) -> int:
    """Return the size that a tensor has along a dimension of the `ndim` it is broadcast to."""
    k = dim - (ndim - p.ndim)
    return p.shape[k] if k >= 0 else 1


def _count_repeated(p: Tensor, ndim: int) -> int:
    """Count the leading dimensions along which a tensor is repeated when it is broadcast."""
    return next((k for k in range(ndim) if broadcast_size(p, k, ndim) != 1), ndim)


def as_factor(saved: Tensor, d: Tensor) -> Tensor:
    """Return the factor of d in a gradient: the complex conjugate, in the type of d.

    Under autocast the type of d differs from that of the input.
    """
    is_number = saved.is_floating_point() or saved.is_complex()
    return saved.to(d.dtype).conj().resolve_conj() if is_number else saved
