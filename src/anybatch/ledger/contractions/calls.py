"""Calls of torch that take parameters, and the batch that passes through them.

    P_i = p for each example i,    y_i = f(x_i, P_i),    g_i = dL/dP_i

A handler gets a `Call` and the `Context` of the batch. It runs the call with its parameters as
constants or as one copy per example, and passes their gradients to the context's receiver.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from anybatch._torch import tree_leaves, tree_map
from anybatch.ledger.contractions.base import Contraction, PerExample, RuleResult
from anybatch.ledger.contractions.placement import Placement, Plan, Site, list_placements
from anybatch.ledger.gradient_taps import copy_constant, tap
from anybatch.ledger.unplaced import UnplacedError

__all__ = ["Call", "Context", "Make", "ParameterTracker", "Receive", "as_factor", "broadcast_size"]

Make = Callable[[Placement], list[Contraction]]
"""Make the contraction of each site of a call, once rows have owners."""
Receive = Callable[[list[Site], Placement, Make, Tensor], None]
"""Take the gradient of a call's output, or of the copies of a parameter, in the backward pass."""


class Call(NamedTuple):
    """One call of a torch function that takes parameters or tensors derived from them."""

    func: Any
    args: Any
    kwargs: Any
    data: list[Tensor]  # operands that are no parameters
    parameters: list[Tensor]
    sites: dict[int, Site]  # by the id of each parameter
    site: Site  # of the first parameter, which decides the placement

    def run(self) -> Any:
        """Run the call unchanged."""
        return self.func(*self.args, **self.kwargs)

    @property
    def is_in_place(self) -> bool:
        """True if the call writes into a parameter or a derived tensor."""
        name = self.func.__name__
        is_write = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        return is_write and id(self.args[0]) in self.sites

    def run_with(self, replace: Callable[[Tensor], Tensor]) -> Any:
        """Run the call with each parameter replaced by `replace(parameter)`."""

        def map_leaf(leaf: Any) -> Any:
            return replace(leaf) if id(leaf) in self.sites else leaf

        args, kwargs = tree_map(map_leaf, (self.args, self.kwargs))
        return self.func(*args, **kwargs)


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
        self.labels = {name: name for name in self.parameters}
        """Name of each tensor that is the same in every pass."""

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
            if not isinstance(leaf, Tensor) or id(leaf) in self.names:
                continue
            self.sources |= roots
            if leaf.requires_grad:
                label = f"{operation}({self.labels[names[0]]})"
                name = f"{label}#{len(self.derived)}"
                self.names[id(leaf)], self.labels[name], self.roots[name] = name, label, roots
                self.derived[name] = leaf


@dataclass(frozen=True, slots=True)
class Context:
    """Examples that pass through the model at present."""

    tracker: ParameterTracker
    num_examples: int  # 0: the next calls process no examples
    plan: Plan
    receive: Receive

    def place(
        self, call: Call, shape: tuple[int, ...], leading: int, *, by_rows: bool = False
    ) -> Placement | None:
        """Choose where the examples lie in the first dimensions of a tensor; None: nowhere."""
        possible = list_placements(shape, self.num_examples, leading, by_rows=by_rows)
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
            self.receive([site], Placement("dim", layout=layout), lambda _: [PerExample(d)], d)

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
        sites = [site for site, _ in uses]
        for site in sites:
            self.tracker.count_use(site)

        def receive(d: Tensor, *saved: Tensor) -> None:
            def make(place: Placement) -> list[Contraction]:
                tensors = [d, *(as_factor(x, d) for x in saved)]
                tensors = [place.move_first(x, self.num_examples) for x in tensors]
                return [make_use(*tensors) for _, make_use in uses]

            self.receive(sites, placement, make, d)

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
