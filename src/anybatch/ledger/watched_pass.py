"""One forward and backward pass that the ledger watches.

    intercepted forward  ->  backward of sum_i v_i  ->  sums and norms by example and parameter

The ledger adds the sums to `.grad`, where autograd would put them. If autograd itself puts a
gradient there, the ledger has missed a use of a parameter, which is an error. A parameter with one
use is finished when its gradient arrives. One with several waits for all of them, since |sum of
g|^2 is not the sum of |g|^2.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anybatch._torch import DisableTorchFunction
from anybatch.errors import AnybatchError
from anybatch.ledger.confirmation import RowCheck, preserve_grads, run_backward
from anybatch.ledger.contractions.base import (
    Broadcast,
    Contraction,
    PerExample,
    iterate_gradients,
    square_norms,
    sum_and_square,
)
from anybatch.ledger.contractions.calls import ParameterTracker, Receive, Uses
from anybatch.ledger.contractions.derived import Derived
from anybatch.ledger.contractions.linear import Product
from anybatch.ledger.contractions.placement import Placement, Plan, Site
from anybatch.ledger.intercept import Intercept
from anybatch.ledger.row_owners import DoubtError
from anybatch.ledger.trial_run import record_state
from anybatch.ledger.unplaced import UnplacedError

__all__ = [
    "GradientCollector",
    "GradientStats",
    "WatchedPass",
    "add_to_grad",
    "convert_errors",
    "disable_compile",
    "dot_uses",
    "refuse_missed",
]

_FIRST_STEPS, _EVERY = 16, 32
"""Steps that are confirmed even if no call may have moved rows: the first 16, then one in 32, which
costs 2 % of the time."""


@dataclass(frozen=True, slots=True)
class GradientStats:
    """Sums and norms of the gradients of B examples, by parameter."""

    totals: dict[str, Tensor] = field(default_factory=dict)  # sum_i c_i g_i
    squares: dict[str, Tensor] = field(default_factory=dict)  # |g_i|^2, [B]
    gradients: dict[str, Tensor] = field(default_factory=dict)  # g_i, [B, ...], on request
    uses: dict[str, list[Contraction]] = field(default_factory=dict)  # for inner products


class GradientCollector:
    """Collects contractions as they arrive, and computes sums and norms.

    Args:
        weights: c [B]; None: 1 each.
        weigh: computes c from sum |g_i|^2 over all parameters [B], if c depends on them.
        keep: whether to keep the uses, for inner products.
        whole: whether to keep the gradient of each example.
        earlier: uses of the same examples in earlier backward passes. They count in the norms, but
            not in the sums.
    """

    def __init__(
        self,
        weights: Tensor | None,
        weigh: Callable[[Tensor], Tensor] | None = None,
        *,
        keep: bool,
        whole: bool,
        earlier: Mapping[str, list[Contraction]] | None = None,
    ) -> None:
        self.keep = keep
        self._stats = GradientStats()
        self._weights, self._weigh, self._whole = weights, weigh, whole
        self._earlier = earlier or {}
        self._pending: dict[str, list[Contraction]] = {}

    def add(self, name: str, use: Contraction, num_uses: int | None) -> None:
        """Add one use of a parameter; `num_uses` is the number to expect, None if unknown."""
        pending = self._pending.setdefault(name, [])
        pending.append(use)
        if len(pending) == num_uses:
            self._finish_parameter(name)

    def expects_more(self, num_uses: Mapping[str, int]) -> bool:
        """Return whether some parameter has fewer uses so far than it will have."""
        return any(len(uses) < num_uses.get(name, 0) for name, uses in self._pending.items())

    def move_to_parameters(self, tracker: ParameterTracker) -> None:
        """Replace uses of derived tensors by uses of the parameters they were computed from."""
        for name, tensor in tracker.derived.items():
            for use in self._pending.pop(name, []):
                for root in tracker.roots[name]:
                    p = tracker.parameters[root]
                    self._pending.setdefault(root, []).append(Derived(p, tensor, use))

    @torch.no_grad()
    def finish(self) -> GradientStats:
        """Finish all parameters, including those that received fewer gradients than uses."""
        for name in list(self._pending):
            self._finish_parameter(name)
        stats = self._stats
        if self._weigh is not None:
            weights = self._weigh(torch.stack(list(stats.squares.values())).sum(0))
            for name, uses in stats.uses.items():
                stats.totals[name] = _sum_uses(uses, weights)
        if not self.keep:
            stats.uses.clear()
        return stats

    def _finish_parameter(self, name: str) -> None:
        uses, stats = _merge_products(self._pending.pop(name)), self._stats
        if self._whole:
            stats.gradients[name] = _sum_whole(uses)
            if len(uses) > 1 or not uses[0].is_outer:
                uses = [PerExample(stats.gradients[name])]
        if self.keep or self._weigh is not None:
            uses = [use.compact() for use in uses]
            stats.uses[name] = uses
        if self._weigh is not None:
            stats.squares[name] = _square_uses(uses)
        elif len(uses) == 1:
            stats.totals[name], stats.squares[name] = uses[0].sum_and_square(self._weights)
        else:
            stats.totals[name], stats.squares[name] = sum_and_square(uses, self._weights)
        if name in self._earlier:
            stats.squares[name] = _square_uses(_merge_products([*self._earlier[name], *uses]))


def _merge_products(uses: list[Contraction]) -> list[Contraction]:
    """Merge all products with the same matrix into one, by concatenating their rows."""
    products: dict[bool, list[Product]] = {}
    others: list[Contraction] = []
    for use in uses:
        if isinstance(use, Product):
            products.setdefault(use.is_transposed, []).append(use)
        else:
            others.append(use)
    merged = [
        group[0]
        if len(group) == 1
        else Product(
            torch.cat([use.a for use in group], 1), torch.cat([use.d for use in group], 1), key
        )
        for key, group in products.items()
    ]
    return [*merged, *others]


def _sum_uses(uses: list[Contraction], weights: Tensor | None) -> Tensor:
    """Compute sum_i c_i g_i over all uses."""
    sums = [use.sum_gradients(weights) for use in uses]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def dot_uses(uses: list[Contraction], direction: Tensor) -> Tensor:
    """Compute <g_i, direction> over all uses, [B]."""
    return torch.stack([use.widen().dot(direction) for use in uses]).sum(0)


def _sum_whole(uses: list[Contraction]) -> Tensor:
    """Compute g_i over all uses, in memory that no one else holds."""
    g = uses[0].gradients()
    if len(uses) == 1 and isinstance(uses[0], PerExample | Broadcast):  # autograd's own memory
        return g.clone(memory_format=torch.contiguous_format)
    for use in uses[1:]:
        g = g + use.gradients()
    return g.contiguous()


def _square_uses(uses: list[Contraction]) -> Tensor:
    if len(uses) == 1:
        return uses[0].square_norms()
    return torch.cat([square_norms(g) for _, _, g in iterate_gradients(uses)])


class WatchedPass:
    """A forward pass, made within `mode`, and the backward pass through it.

    Args:
        parameters: the trainable ones, by name.
        num_examples: B.
        plan: placements of the examples.
        roots: objects that the user's hooks can change in a backward pass.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        num_examples: int,
        plan: Plan,
        roots: Iterable[object] = (),
    ) -> None:
        self._parameters, self._roots = parameters, roots
        self._size, self.plan = num_examples, plan
        self._receiver: Receive | None = None
        self._rows = RowCheck(num_examples, plan, self._run)
        self.mode = Intercept(parameters, num_examples, plan, self._receive)
        """The context of the forward pass."""

    def backward(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor], **options: Any
    ) -> GradientStats:
        """Go backward from the values, and add sum_i c_i g_i to `.grad`.

        Args:
            values: losses of the model, with a graph.
            gradients: weights of the values in the backward pass, 1 for each example.
            options: of `go_back`.

        Raises:
            LedgerError: a gradient that the ledger has missed, or examples that reach rows of
                others.
        """
        if self._size > 1 and self.plan.has_rows and not self.plan.unconfirmed:
            with self._preserve_state(values):
                self._rows.find_scales(values, gradients)
            try:
                return self.go_back(values, gradients, keeps_graph=True, **options)
            except DoubtError:
                self._confirm(values, gradients)
            finally:
                self._rows.scales = None
        elif self._size > 1:
            self._confirm(values, gradients)
        return self.go_back(values, gradients, **options)

    def go_back(
        self,
        values: Sequence[Tensor],
        gradients: Sequence[Tensor],
        *,
        keeps_graph: bool = False,
        weights: Tensor | None = None,
        weigh: Callable[[Tensor], Tensor] | None = None,
        keep: bool = False,
        whole: bool = False,
    ) -> GradientStats:
        """Do what `backward` does, if the placements are known to be right.

        Args:
            values: losses of the model.
            gradients: their weights in the backward pass.
            keeps_graph: whether another backward pass can follow.
            weights: c [B], the weights of the sums; None: 1 each.
            weigh: computes c from sum |g_i|^2 [B], if c depends on them.
            keep: whether to keep the uses, for inner products.
            whole: whether to keep each example's gradient.

        Raises:
            LedgerError: a gradient that the ledger has missed.
        """
        collector = GradientCollector(weights, weigh, keep=keep, whole=whole)
        tracker = self.mode.tracker

        def receive(uses: Uses, placement: Placement, d: Tensor) -> None:
            placement = self._rows.resolve(uses[0][0], placement, d)
            for site, make in uses:
                name = site.parameter
                num_uses = None if tracker.is_indirect(name) else tracker.uses.get(name)
                collector.add(name, make(placement), num_uses)

        with refuse_missed(self._parameters):
            run = partial(run_backward, values, gradients, keeps_graph=keeps_graph)
            self._run(run, receive)
        collector.move_to_parameters(tracker)
        stats = collector.finish()
        if tracker.derived:  # two parameters can share one gradient, which autograd copies
            add_to_grad(self._parameters, stats.totals)
        else:
            self._add_without_hooks(stats.totals)
        tracker.derived.clear()  # frees their graph
        return stats

    def find_misplaced(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> set[tuple[Site, Placement]]:
        """Find the sites where losses of some examples reach rows of others."""
        return self._rows.find_misplaced(values, gradients)

    def _add_without_hooks(self, totals: Mapping[str, Tensor]) -> None:
        """Add gradients to `.grad`. The caller of the update runs the hooks of parameters."""
        for name, total in totals.items():
            p = self._parameters[name]
            total = total.to(p.dtype)
            p.grad = total if p.grad is None else p.grad.add_(total)

    def _confirm(self, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Check that examples reach only their own rows, if that may have changed.

        Raises:
            UnplacedError: they reach others.
        """
        plan = self.plan
        if not plan.unconfirmed and not plan.has_rows:
            is_due = plan.num_steps <= _FIRST_STEPS or plan.num_steps % _EVERY == 0
            if not self.mode.may_mix and not is_due:
                return
        with self._preserve_state(values):
            self._rows.confirm(values, gradients)

    @contextmanager
    def _preserve_state(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Restore all that backward passes change."""
        restore = record_state(self._roots, self._parameters.values())
        try:
            with preserve_grads(values):
                yield
        finally:
            restore()

    def _run(self, run: Callable[[], object], receive: Receive) -> None:
        """Run a backward pass, and hand its gradients to a receiver."""
        self._receiver, self.mode.tracker.is_forward = receive, False
        try:
            with self.mode:  # checkpointing runs forward again in the backward pass
                run()
        finally:
            self._receiver, self.mode.tracker.is_forward = None, True

    def _receive(self, uses: Uses, placement: Placement, d: Tensor) -> None:
        if self._receiver is not None:
            with DisableTorchFunction():  # no parameters in what is computed from here on
                self._receiver(uses, placement, d)


@contextmanager
def convert_errors() -> Iterator[None]:
    """Convert an error of torch in a watched operation into an `UnplacedError`.

    An error of the user's own code is raised again when the examples go one at a time.
    """
    try:
        yield
    except (AnybatchError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnplacedError(
            f"The ledger cannot take an operation apart by example. Torch says: "
            f"{type(error).__name__}: {error}"
        ) from error


def disable_compile() -> AbstractContextManager[object]:
    """Return a context in which compiled code runs as Python.

    The ledger sees the operations then, and can go through their graph more than once.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def refuse_missed(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Check that a backward pass leaves `.grad` alone, since all gradients go to the ledger.

    Raises:
        UnplacedError: autograd has added a gradient to `.grad`.
    """
    before = [(g := p.grad, -1 if g is None else g._version) for p in parameters.values()]
    yield
    for (name, p), (gradient, version) in zip(parameters.items(), before, strict=True):
        if p.grad is not gradient or (gradient is not None and gradient._version != version):
            raise UnplacedError(
                f"A gradient has reached {name} past the ledger. The parameter is used in scripted "
                f"code, in a torch.autograd.Function, under torch.func, for one example at a time, "
                f"or in a way that began in the backward pass. Write that use as operations of "
                f"torch on the batch, or freeze the parameter."
            )


def add_to_grad(parameters: Mapping[str, nn.Parameter], totals: Mapping[str, Tensor]) -> None:
    """Add gradients to `.grad` as a backward pass does, with the hooks of parameters."""
    if totals:
        reached = [parameters[name] for name in totals]
        gradients = [total.to(p.dtype) for total, p in zip(totals.values(), reached, strict=True)]
        run_backward(reached, gradients)
